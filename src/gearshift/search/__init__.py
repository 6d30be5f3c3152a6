"""Numbers -> placements: single-layer scores, the exact solver, beam search, the Pareto front."""

from gearshift.search.beam import BeamSearch, BeamSettings, Level
from gearshift.search.budget import Budget, name_budgets
from gearshift.search.ledger import Ledger
from gearshift.search.pareto import non_dominated
from gearshift.search.result import Candidate, Chosen, Dominated, SearchResult, check_folder, write_result
from gearshift.search.run import check_budgets, search
from gearshift.search.scores import ScoreTable, pure_placements, single_changes
from gearshift.search.settings import SearchSettings
from gearshift.search.solver import Predicted, Solver

__all__ = [
    "BeamSearch",
    "BeamSettings",
    "Budget",
    "Candidate",
    "Chosen",
    "Dominated",
    "Ledger",
    "Level",
    "Predicted",
    "ScoreTable",
    "SearchResult",
    "SearchSettings",
    "Solver",
    "check_budgets",
    "check_folder",
    "name_budgets",
    "non_dominated",
    "pure_placements",
    "search",
    "single_changes",
    "write_result",
]
