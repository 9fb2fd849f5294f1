"""placeholder"""
class PoseMeter:
    def __init__(self, annotations, skeleton): self.a=annotations; self.s=skeleton; self.n=0
    def add(self, outcome): self.n+=1
    def result(self): return {"eval/ap": 0.0}
    def per_class(self): return {}
    def results(self): return []
