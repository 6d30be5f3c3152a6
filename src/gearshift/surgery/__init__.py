"""Declarative edits of a model: spec -> spec, and the plan that carries the weights along."""

from gearshift.surgery.operate import Surgery, load_surgery, operate, prune

__all__ = ["Surgery", "load_surgery", "operate", "prune"]
