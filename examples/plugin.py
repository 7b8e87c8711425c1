"""A saliency and a method of your own: copy this file, change it, and give it to any command with --plugin.

moecover plan profile --plugin examples/plugin.py --saliency energy --retain 0.5 -o plan.json
moecover plan profile --plugin examples/plugin.py --method loudest --option floor=0.001 --retain 0.5 -o plan.json
moecover ls methods --plugin examples/plugin.py
"""

import numpy as np

from moecover import METHODS, SALIENCIES
from moecover.planning.saliency import utility_of
from moecover.planning.selection import layer_plan, ranked, scaled


@SALIENCIES("energy", paper="example")
def energy(s):
    """Mean over all tokens of the squared weighted output norm."""
    return s["weighted_sq_sum"] / s["num_tokens"]


@METHODS("loudest", paper="example")
def loudest(profile, budget, *, saliency="contribution", floor=0.0):
    """The experts whose scaled utility is largest in any one corpus; below the floor only the mean counts."""
    shares = {corpus: scaled(utility_of(saliency, s)) for corpus, s in profile.statistics.items()}
    best, mean = np.max(list(shares.values()), axis=0), np.mean(list(shares.values()), axis=0)
    orders = ranked(np.where(best > floor, 1 + best, mean))
    plans = []
    for layer, order in enumerate(orders.tolist()):
        room = budget.room(layer)  # the places of the layer: required experts are in it, router groups stay equal
        plans.append(layer_plan(profile, layer, room, room.fill(order), utility=shares))
    return plans
