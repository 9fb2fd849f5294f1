"""Pictures of what models do.

Every function that draws returns a matplotlib Figure and has no other effect; `figure.savefig`
writes it.
"""
