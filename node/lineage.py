"""Which run of training a revision's weights are of.

Rules: core. A run's rounds have revisions that follow one another; whoever counts or goes on by the run asks here.
"""

from __future__ import annotations

import re

TRAINED = re.compile(  # as node.training_plan.Plan.revision_at names them, and model.config.ModelFacts.at
    r"(.+)-r\d+-[0-9a-f]{12}(-int[48])?"
)


def lineage_of(revision: str) -> str:
    """The run of training that a revision is of, and how its weights are quantized; '' for weights that are of none."""
    found = TRAINED.fullmatch(revision)
    return found[1] + (found[2] or "") if found is not None else ""
