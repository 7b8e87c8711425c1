"""Merging: adds up profiles of one model that were made from different samples."""

from __future__ import annotations

from collections.abc import Sequence

from moecover.errors import InputError, arg
from moecover.profiling.artifact import Profile
from moecover.profiling.statistics import LATER, OF_MTP, known


def differing(profiles: Sequence[Profile]) -> list[str]:
    """The settings in which profiles differ, in words; they are unknown of the sum."""
    found = []
    for name in dict.fromkeys(key for profile in profiles for key in profile.settings):
        values = list(dict.fromkeys(str(profile.settings.get(name)) for profile in profiles))
        if len(values) > 1:
            found.append(f"{name.replace('_', ' ')} ({', '.join(values)})")
    return found


def lost(total: Profile, profiles: Sequence[Profile]) -> dict[str, list[str]]:
    """By statistic that a profile may lack, corpora of which a sum has none of it though some of its profiles have."""
    found = {
        name: [c for c in total.corpora if c not in values and any(c in profile.wide[name] for profile in profiles)]
        for name, values in total.wide.items()
    }
    for name in LATER:
        found[name] = [
            corpus
            for corpus, statistics in total.statistics.items()
            if not known(name, statistics)
            and any(corpus in one.statistics and known(name, one.statistics[corpus]) for one in profiles)
        ]
    if total.mtp is None and any(one.mtp is not None for one in profiles):
        found[f"statistics of {OF_MTP}"] = list(
            dict.fromkeys(c for one in profiles if one.mtp is None for c in one.corpora)
        )
    return {name: corpora for name, corpora in found.items() if corpora}


def merged(profiles: Sequence[Profile], names: Sequence[str]) -> Profile:
    """Add up profiles of different samples.

    Args:
        profiles: profiles of one model.
        names: their names in messages.

    Raises:
        InputError: the models or the widths of their experts differ, or two profiles hold the same sample of a corpus.
    """
    seen: dict[tuple[str, str], str] = {}
    for profile, name in zip(profiles, names, strict=True):
        for corpus, records in profile.corpora.items():
            for record in records:
                if (other := seen.get((corpus, record["sha256"]))) is not None:
                    raise InputError(
                        f"{name} and {other} hold the same sample of corpus {corpus}: it would count twice. Use other"
                        f" blocks ({arg('seed')}, {arg('sequences')}) or leave one out"
                    )
                seen[corpus, record["sha256"]] = name
    total = profiles[0]
    for profile in profiles[1:]:
        total = total + profile
    return total
