"""Where a measurement begins to be a sign of trouble: one truth for the detectors of a run and for the report on it.

Each pair is a limit and the value at which it is over again, so that what flickers around a limit is one sign.
"""

ENTROPY_COLLAPSED, ENTROPY_RECOVERED = 0.1, 0.2
"""Share of its ceiling below which a head attends to few keys; chosen here, after Zhai et al. 2023, arXiv:2303.06296."""
LOGITS_DIVERGED = 1e4
"""Attention logits at which every run of Wortsman et al. 2023, arXiv:2309.14322, diverged."""
LOGITS_LARGE, LOGITS_ORDINARY = 1e3, 5e2
"""Chosen here: a tenth of the limit of Wortsman et al. 2023."""
RANK_COLLAPSED, RANK_RECOVERED = 0.01, 0.02
"""Rank residual; chosen here: half of what 12 Post-LN layers leave at initialization (Dong et al. 2021, arXiv:2103.03404)."""
ALWAYS_CLIPPED = 0.9
"""Clip rate above which the threshold, not the gradient, sets the length of every update; chosen here."""
LOSS_HIGH, LOSS_CLEAR = 0.25, 0.05
"""Shares of its fall so far that a loss gives back: it has left its course, and it clearly rises; chosen here."""
LOSS_STALLED = 0.05
"""A loss that has fallen by less than this share has learned nothing; chosen here."""
RECENT_SHARE, RECENT_STEPS = 0.25, 200
"""How long before the loss rose an ordinary sign may begin to be blamed, in steps and as a share of them; chosen here."""
OVER_FITTING_RISE = 0.02
"""Least rise of the evaluation loss above its best, as a share of that; chosen here."""
