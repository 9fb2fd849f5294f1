"""Varies the numbers of groups G and of selected keys k, like Table 4(b) of DGT, on a small scale.

    python -m experiments.dgt.ablation

The paper halves G = 48 and k = 98 on ImageNet and loses 0.2 and 0.1 points. This is NOT that
experiment: it uses the embedded digits, a small DGT-T with G = 8 and k = 24, 160 steps and 360 test
images (one image is 0.3 points). Writes ablation.md here.
"""

from experiments import pages
from experiments.dgt.routing_runs import RoutingRun, run_all
from experiments.pages import mean_and_std
from experiments.short_runs import describe, last_loss

SETTINGS = {
    (num_groups, top_k): {
        "model_overrides.num_groups": num_groups,
        "model_overrides.top_k": top_k,
    }
    for num_groups, top_k in ((8, 24), (4, 24), (8, 12))
}


def page(runs: dict[tuple[int, int], list[RoutingRun]]) -> list[str]:
    """Returns the lines of the page."""
    about = (
        f"{describe('DGT-T')} This is not the paper's Table 4(b), which is on ImageNet "
        "(G 24, k 98: 83.6; G 48, k 49: 83.7; G 48, k 98: 83.8 % top-1)."
    )
    rows = [
        [
            *sizes,
            mean_and_std([run.accuracy for run in group]),
            mean_and_std([last_loss(run) for run in group]),
        ]
        for sizes, group in runs.items()
    ]
    return [
        *pages.heading("Numbers of groups and keys", __file__, about),
        "",
        *pages.table(["G", "k", "test accuracy", "last training loss"], rows),
    ]


if __name__ == "__main__":
    pages.write(__file__, page(run_all(SETTINGS)))
