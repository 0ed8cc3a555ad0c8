"""`llama plan`: how many machines a load takes, by simulation."""

from pathlib import Path
from typing import Optional

from llama.apps.options import flat
from llama.apps.plan_options import PlanOptions


@flat("Plan")
class Planned(PlanOptions): ...


def plan(options: Planned, *, measure: Optional[Path] = None, json: bool = False) -> None:
    """Say how many machines serve a load, in which split, and how long requests would wait.

    The engine's own scheduler runs on a virtual clock, with random arrivals (Poisson) and lengths
    (lognormal). What a pass takes is fitted to passes measured on a machine, or estimated from a
    kind's published figures. One replica stands for all: requests go to replicas at random, so each
    sees its share of the rate. Figures are means of five simulations, with 95 % intervals.

    Args:
        measure: measure the model's passes on this machine, and write them to this file, for
            --machine. Takes a minute or more; nothing else should run.
        json: print a line of JSON, of what was measured too.

    Raises:
        ValueError: options out of range; a model that fits no machine, or a load that none serves.
        FileNotFoundError: no checkpoint there, to be measured.
    """
    from json import dumps

    if measure is not None:
        from llama.apps import measuring

        measured = measuring.write(options, measure)
        print(dumps(measured) if json else measuring.line(measured))
        return
    from llama.apps import planning

    found = planning.plan(options)
    print(dumps(found) if json else "\n".join(planning.lines(found)))
