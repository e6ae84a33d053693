"""The place test on nonces of real clusters and on simulated machines: what it calls faulty, rightly and wrongly.

DATA is a file of sets of nonce vectors, one JSON object a line with ``set``, ``config``, ``block_hash``,
``public_key``, ``nonces`` and ``vectors`` (base64 of float16). Two sets of one block, key and model are a pair, unless
more than a tenth of their vectors are equal: such sets are copies. Pairs with a set named by ``--fault`` are those of
machines with a fault. All others count as sound, and the honest law of a model is fitted to them.

    python benchmarks/places.py DATA -o benchmarks/results/places.json
"""

import base64
import gzip
import itertools
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
from _common import note, parser, publish

from assay import stats
from assay.poc.verdict import Noise, judge_residuals, sequential_test

SIZES = (64, 300, 1000)
PROVED = 4096  # nonces of a simulated proof, of which 64 or 300 are drawn; 1000 are all of a proof
BATCH = 32
HONEST, SPREAD, JUNK = 0.27, 0.48, 0.9  # L2 of a large mixture of experts: honest median, sd of its logarithm, junk


FAULTY = ("2026-04__minimax-m27-fp8-2xh200", "2026-04__minimax-m27-fp8-4xa100", "2026-04__minimax-m27-fp8-4xh100")
FAULTY += ("rtx", "awq")
ALIKE = {"awq": "minimax"}  # no sound pair of four-bit weights was published: its law is that of eight bits


def judged(noise, distances, positions, batch_size):
    """Return the outcome and the place test."""
    test = sequential_test(noise)
    outcome, _, places = judge_residuals(distances, noise, test=test, positions=positions, batch_size=batch_size)
    return outcome, places


# Real clusters


def read_sets(path):
    """Return {name: (row, vectors [N, K])}."""
    found = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            vectors = np.stack([np.frombuffer(base64.b64decode(text), "<f2") for text in row.pop("vectors")])
            found[row["set"]] = (row, vectors.astype(np.float64))
    return found


def model_of(name):
    """Return the model that a set is named after; sets of different models are not compared."""
    return next((model for model in ("awq", "minimax", "qwen", "kimi") if model in name.lower()), name)


def read_pairs(path, words):
    """Return one dict per pair of sets, with its distances [N]."""
    found = []
    for (one, (row, values)), (two, (other, others)) in itertools.combinations(read_sets(path).items(), 2):
        comparable = all(row[key] == other[key] for key in ("block_hash", "public_key", "nonces"))
        if comparable and model_of(one) == model_of(two):
            distances = np.linalg.norm(values - others, axis=1)
            if np.mean(distances == 0) <= 0.1:
                pair = {"sets": (one, two), "fault": any(word in one + two for word in words), "distances": distances}
                pair |= {"model": model_of(one), "positions": np.array(row["nonces"])}
                found.append(pair | {"batch_size": row["config"].get("batch_size")})
    return found


def noises_of(pairs):
    """Return the honest noise of each model, of its pairs without a fault."""
    sound = {}
    for pair in pairs:
        if not pair["fault"]:
            sound.setdefault(pair["model"], []).append(pair["distances"])
    noises = {model: honest_noise(distances) for model, distances in sound.items()}
    return noises | {model: noises[other] for model, other in ALIKE.items() if other in noises}


def honest_noise(pairs):
    """Return the law of all these distances, with the spread of their medians between pairs of machines."""
    medians = [float(np.median(distances)) for distances in pairs]
    spread = stats.Spread(float(np.std(np.log(medians))))
    return Noise(stats.fit_log_noise(np.concatenate(pairs)).law, "pairs without a fault", spread)


def of_clusters(pairs, repeats, rng):
    """Test each pair in full and in random samples."""
    noises, rows = noises_of(pairs), []
    for pair in pairs:
        noise, distances, positions = noises[pair["model"]], pair["distances"], pair["positions"]
        verdict, test = judged(noise, distances, positions, pair["batch_size"])
        row = {"sets": pair["sets"], "fault": pair["fault"], "batch_size": pair["batch_size"], "verdict": verdict}
        row |= {"p_value": test.p_value, "pattern": test.pattern, "share": test.share, "ratio": test.ratio}
        for size in SIZES[:2]:
            drawn = [rng.permutation(positions.size)[:size] for _ in range(repeats)]
            verdicts = [judged(noise, distances[n], positions[n], pair["batch_size"])[0] for n in drawn]
            row[f"{size} nonces"] = {name: count / repeats for name, count in Counter(verdicts).items()}
        note(f"{' against '.join(pair['sets'])}: {verdict}, {test.pattern}")
        rows.append(row)
    return {"rows": rows, "repeats": repeats, "with_fault": summary(rows, True), "sound": summary(rows, False)}


def summary(rows, fault):
    """Return how many pairs are faulty, and the mean shares of verdicts of their samples."""
    chosen = [row for row in rows if row["fault"] == fault]
    found = {"pairs": len(chosen), "in full": dict(Counter(row["verdict"] for row in chosen))}
    for size in SIZES[:2]:
        shares = Counter()
        for row in chosen:
            shares.update(row[f"{size} nonces"])
        found[f"{size} nonces"] = {name: total / len(chosen) for name, total in shares.items()}
    return found


def batch_effects(pairs):
    """Return quartiles and maximum, over sound pairs, of the variance of ln L2 between batches over what chance gives.

    It is the F statistic of a one-way analysis of variance: 1 on average where batches share nothing.
    """
    found = {}
    for size in (16, 32, 64):
        ratios = []
        for pair in pairs:
            whole = pair["distances"].size // size * size
            logs = np.log(np.maximum(pair["distances"][:whole], 1e-4)).reshape(-1, size)
            if not pair["fault"]:
                ratios.append(size * logs.mean(axis=1).var(ddof=1) / logs.var(axis=1, ddof=1).mean())
        found[f"batches of {size}"] = np.quantile(ratios, (0.25, 0.5, 0.75, 1.0)).tolist()
    return found


# Simulated machines


def log_normal(rng, positions):
    return HONEST * np.exp(SPREAD * rng.normal(size=positions.size))


HONEST_NOISE = {
    "log-normal, sd 0.5": lambda rng, positions: np.exp(0.5 * rng.normal(size=positions.size)),
    "Student's t, 3 degrees": lambda rng, positions: rng.standard_t(3, positions.size),
    "nine of ten equal": lambda rng, positions: log_normal(rng, positions) * (rng.random(positions.size) < 0.1),
    "a scale per batch, log-normal, sd 0.2": lambda rng, positions: (
        log_normal(rng, positions) * np.exp(0.2 * rng.normal(size=PROVED // BATCH))[positions // BATCH]
    ),
}

BAD_PLACES = {  # (batch size that the proof states, whether a position is bad)
    "first of a batch of 16": (16, lambda position: position % 16 == 0),
    "first of a batch of 32": (32, lambda position: position % 32 == 0),
    "six of a batch of 16": (16, lambda position: position % 16 < 6),
    "ten of 32, where 8 are stated": (8, lambda position: position % 32 < 10),
    "three of 16 and, on the other machine, ten of 32": (16, lambda p: (p % 16 < 3) | (p % 32 < 10)),
    "places 3, 7 and 12 of 16": (16, lambda position: np.isin(position % 16, (3, 7, 12))),
    "one of four ranks that take turns": (32, lambda position: position // 32 % 4 == 1),
    "second half of the run": (32, lambda position: position >= (position.max() + 1) // 2),
    "first batch": (32, lambda position: position < 32),
}


def drawn(rng, size):
    """Return the positions that are checked: a sample of a long proof, or all of a shorter one."""
    return np.arange(size) if size == SIZES[-1] else rng.permutation(PROVED)[:size]


def of_honest_noise(repeats, rng):
    """Test honest noise of several laws: shares called faulty and suspected."""
    found = {}
    for name, draw in HONEST_NOISE.items():
        for size in SIZES:
            tests = []
            for _ in range(repeats):
                positions = drawn(rng, size)
                tests.append(stats.place_test(draw(rng, positions), positions, batch_size=BATCH))
            row = {"faulty": sum(test.faulty for test in tests) / repeats}
            row |= {f"p up to {p}": sum(test.p_value <= p for test in tests) / repeats for p in (0.01, 0.05)}
            found[f"{name}, {size} nonces"] = row
            note(f"{name}, {size}: {row}")
    return {"repeats": repeats, "batch_size": BATCH, "laws": found}


def of_faults(noise, repeats, rng):
    """Put junk at bad places: shares of verdicts, and which residuals are set aside."""
    found = {}
    for (name, (batch_size, is_bad)), size in itertools.product(BAD_PLACES.items(), SIZES):
        verdicts, right, wrong = Counter(), [], []
        for _ in range(repeats):
            positions = drawn(rng, size)
            bad = is_bad(positions)
            distances = np.where(bad, JUNK / HONEST, 1.0) * log_normal(rng, positions)
            verdict, test = judged(noise, distances, positions, batch_size)
            verdicts[verdict] += 1
            if test.faulty:
                right.append(test.set_aside[bad].mean())
                wrong.append(test.set_aside[~bad].mean())
        row = {verdict: count / repeats for verdict, count in verdicts.items()}
        found[f"{name}, {size} nonces"] = row | {
            "bad_set_aside": float(np.mean(right)) if right else None,
            "good_set_aside": float(np.mean(wrong)) if wrong else None,
        }
        note(f"{name}, {size}: {found[f'{name}, {size} nonces']}")
    return {"repeats": repeats, "honest": HONEST, "junk": JUNK, "cases": found}


CHEATS = {
    "all nonces three times noisier": lambda rng, p: np.full(p.size, 3.0),
    "one in ten five times noisier, at random": lambda rng, p: np.where(rng.random(p.size) < 0.1, 5.0, 1.0),
    "half of the nonces invented, at random": lambda rng, p: np.where(rng.random(p.size) < 0.5, 4.0, 1.0),
    "all three times noisier, six of 16 places invented": lambda rng, p: np.where(p % 16 < 6, 4.0, 3.0),
    "nine of 16 places invented": lambda rng, p: np.where(p % 16 < 9, 4.0, 1.0),
    "eight of 16 places invented: not paid": lambda rng, p: np.where(p % 16 < 8, 4.0, 1.0),
    "one of 16 places invented: not paid": lambda rng, p: np.where(p % 16 < 1, 4.0, 1.0),
}


def of_cheats(noise, repeats, rng):
    """Cheat with and without regard to places: shares of verdicts."""
    found = {}
    for (name, scale), size in itertools.product(CHEATS.items(), SIZES):
        verdicts = Counter()
        for _ in range(repeats):
            positions = drawn(rng, size)
            distances = np.minimum(scale(rng, positions) * log_normal(rng, positions), 2.0)
            verdicts[judged(noise, distances, positions, 16)[0]] += 1
        found[f"{name}, {size} nonces"] = {verdict: count / repeats for verdict, count in verdicts.items()}
        note(f"{name}, {size}: {found[f'{name}, {size} nonces']}")
    return {"repeats": repeats, "batch_size": 16, "cases": found}


def durations(rng):
    """Return milliseconds for one test, the median of 50."""
    found = {}
    for size in SIZES:
        positions, times = drawn(rng, size), []
        for _ in range(50):
            started = time.perf_counter()
            stats.place_test(log_normal(rng, positions), positions, batch_size=BATCH)
            times.append(time.perf_counter() - started)
        found[f"{size} nonces"] = 1000 * float(np.median(times))
    return found


def main():
    arguments = parser(__doc__)
    arguments.add_argument("data", type=Path, help="sets of nonce vectors, gzip of JSON lines")
    arguments.add_argument("--fault", nargs="*", default=FAULTY, help="words of faulty sets")
    arguments.add_argument("--repeats", type=int, default=1000)
    options = arguments.parse_args()
    rng = np.random.default_rng(0)
    noise = honest_noise([log_normal(rng, np.arange(PROVED))])
    pairs = read_pairs(options.data, options.fault)
    figures = {
        "alpha": stats.PLACE_ALPHA,
        "material_ratio": stats.MATERIAL_RATIO,
        "honest_noise": of_honest_noise(options.repeats, rng),
        "faults": of_faults(noise, options.repeats // 10, rng),
        "cheats": of_cheats(noise, options.repeats // 10, rng),
        "milliseconds": durations(rng),
        "batch_effects": batch_effects(pairs),
        "clusters": of_clusters(pairs, options.repeats // 20, rng),
    }
    publish("places", figures, options.output)


if __name__ == "__main__":
    main()
