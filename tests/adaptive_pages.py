"""Made-up cells of the adaptive benchmark, whose verdicts are known."""

from __future__ import annotations

NAMES = ("a", "b", "c")
SEEDS = (0, 1)
LEARNED = {"how": "learned", "per_class": 1, "grain": "adapter", "start": "scale", "head": "random", "b_max": 3.0}


def row(test, seed=0, domains=NAMES, head="random", validation=None, **settings):
    scores = dict.fromkeys(NAMES, test) if isinstance(test, float) else test
    cell = {"seed": seed, "domains": list(domains), "head": head, "order": 0, **settings}
    return {
        "cell": cell, "test": scores, "validation": dict.fromkeys(NAMES, validation or 0.5), "device": "cpu", "terms": 10**6,
        "rows_tested": dict.fromkeys(NAMES, 30), "seconds": {"learn": 1.0, "terms": 0.5, "set": 0.1, "all": 2.0},
        "weights": dict.fromkeys(domains, 0.5 + 0.1 * seed), "moved": 0.3, "memory": 10**9,
    }  # fmt: skip


def made_up(cells):
    """W = 0.25 is best and large W collapses; learning is level with the best, but for DARE-TIES, where it is far behind."""
    rows = []
    for seed in SEEDS:
        noise = 0.004 * seed
        rows += [row(0.2, seed, how="base"), row(0.75 + noise, seed, how="own"), row(0.8 + noise, seed, how="joint")]
        for rule in cells.RULES:
            for space in cells.SPACES:
                fall = 0.25 if space == "factors" else 0.05
                for weight in cells.GRID:
                    score = 0.7 + noise - fall * abs(weight - 0.25) if weight < 2 else 0.1
                    rows.append(row(score, seed, rule=rule, space=space, how="fixed", weight=weight))
                for b_max in cells.B_MAX:
                    settings = LEARNED | {"rule": rule, "space": space, "b_max": b_max}
                    better = {"linear": 0.0, "ties": 0.01, "dare_ties": -0.2}[rule]
                    rows.append(
                        row(0.69 + noise * (1 + b_max / 10) + better, seed, validation=0.6 + better, **settings)
                    )
                if space == "factors":
                    cross = {"cross_over_sum": 1.7, "merged": 4.0}
                    rows.append(row(0.1, seed, rule=rule, space=space, how="geometry") | cross | {"test": {}})
        for rule, space in cells.CHOSEN:
            for domains in (("a",), ("a", "b"), ("b",), ("b", "c"), ("c",)):
                rows.append(row(0.6, seed, domains, **LEARNED, rule=rule, space=space))
            for grain, gain in (("adapter", 0.0), ("layer", 0.03)):
                settings = LEARNED | {"rule": rule, "space": space, "per_class": 20, "grain": grain}
                rows.append(row(0.7 + gain + noise * (1 + gain), seed, **settings))
    return rows


def verdict(page, words):
    return next(v for v in page[1] if words in v[0])
