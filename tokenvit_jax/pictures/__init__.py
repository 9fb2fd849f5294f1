"""Draws tokens, label maps and learning curves of models.

Every function that draws returns a matplotlib Figure and has no other effect; `figure.savefig`
writes the figure to a file.
"""
