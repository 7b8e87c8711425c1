"""A saliency and a method of your own: copy this file, change it, and give it to any command with --plugin.

moecover plan profile --plugin examples/plugin.py --saliency energy --retain 0.5 -o plan.json
moecover plan profile --plugin examples/plugin.py --method loudest --option floor=0.001 --retain 0.5 -o plan.json
moecover ls methods --plugin examples/plugin.py
"""

import numpy as np

from moecover import METHODS, SALIENCIES
from moecover.planning.options import SALIENCY, Option
from moecover.planning.saliency import utility_of
from moecover.planning.selection import layer_plan, ranked, scaled


@SALIENCIES("energy", paper="example")
def energy(s):
    """Mean over all tokens of the squared weighted output norm."""
    return s["weighted_sq_sum"] / s["num_tokens"]


def at_least_zero(value):
    """What is wrong with a value of the option below."""
    return None if value >= 0 else "is out of range: 0 or more"


floor_option = Option("floor", "share of a corpus below which only the mean counts", parse=float, check=at_least_zero)


# Without `options`, every keyword argument is an option too: they add a help text, a parser and a range.
@METHODS("loudest", label="Loudest", paper="example", options=(SALIENCY, floor_option))
def loudest(profile, budget, *, saliency="contribution", floor=0.0):
    """The experts whose scaled utility is largest in any one corpus; below the floor only the mean counts."""
    shares = {corpus: scaled(utility_of(saliency, s)) for corpus, s in profile.statistics.items()}
    best, mean = np.max(list(shares.values()), axis=0), np.mean(list(shares.values()), axis=0)
    orders = ranked(np.where(best > floor, 1 + best, mean))
    plans = []
    for layer, order in enumerate(orders.tolist()):
        room = budget.room(layer)  # the places of the layer: required experts have theirs, router groups stay equal
        plans.append(layer_plan(profile, layer, room, room.fill(order), utility=shares))
    return plans
