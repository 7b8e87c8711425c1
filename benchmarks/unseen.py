"""Text of kinds that the shipped models never saw: LaTeX, JSON, chat, JavaScript, SQL, and another script.

Written for this project: sentences and programs from small grammars, seeded, so that nothing of them is in any corpus.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

NOUNS = [
    "graph",
    "lattice",
    "kernel",
    "filter",
    "measure",
    "module",
    "ring",
    "sheaf",
    "tensor",
    "field",
    "manifold",
    "sequence",
    "operator",
    "basis",
]
WORDS = [
    "invoice",
    "customer",
    "order",
    "ticket",
    "sensor",
    "account",
    "parcel",
    "booking",
    "lesson",
    "recipe",
    "device",
    "garden",
    "engine",
    "camera",
]
NAMES = [
    "Ana",
    "Boris",
    "Chidi",
    "Dilnoza",
    "Emre",
    "Farah",
    "Goran",
    "Hana",
    "Ivo",
    "Jun",
    "Kofi",
    "Lena",
    "Mateo",
    "Nadia",
    "Omar",
    "Priya",
]
PLACES = ["Lyon", "Gdansk", "Osaka", "Lima", "Accra", "Tartu", "Bergen", "Quito", "Hanoi", "Tunis", "Perth", "Bilbao"]


def latex(rng: random.Random) -> str:
    """A statement with a proof."""
    a, b, c = rng.sample(NOUNS, 3)
    x, y = rng.sample("xyzuvwst", 2)
    n, k = rng.randint(2, 9), rng.randint(1, 7)
    kind = rng.choice(["lemma", "theorem", "proposition", "corollary"])
    return (
        f"\\begin{{{kind}}}\\label{{{kind[:3]}:{a}-{n}}}\n"
        f"Let ${x} \\in \\mathbb{{R}}^{{{n}}}$ be a point of the {a} $\\mathcal{{{a[0].upper()}}}$. Then\n"
        f"\\begin{{equation}}\n  \\sum_{{i=1}}^{{{n}}} \\frac{{{x}_i^{{{k}}}}}{{{y} + {k}}} \\leq "
        f"\\int_0^{{{k}}} e^{{-{y} t}} \\, \\mathrm{{d}}t .\n\\end{{equation}}\n\\end{{{kind}}}\n"
        f"\\begin{{proof}}\nBy Lemma~\\ref{{lem:{b}-{k}}} the {b} is bounded, $\\|{x}\\|_2 < \\sqrt{{{n}}}$, and the "
        f"{c} $\\phi({x}) = {k}{x}^{{{n}}} - \\alpha_{{{k}}}$ vanishes on $\\partial \\Omega$. \\qedhere\n"
        "\\end{proof}\n\n"
    )


def as_json(rng: random.Random) -> str:
    """Records as a service returns them."""
    record = {
        "id": f"{rng.choice(WORDS)[:3]}_{rng.randrange(16**8):08x}",
        "type": rng.choice(WORDS),
        "active": rng.random() < 0.7,
        "created_at": f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}T{rng.randint(0, 23):02}:05:00Z",
        "owner": {"name": rng.choice(NAMES), "city": rng.choice(PLACES), "score": round(rng.random() * 100, 2)},
        "tags": rng.sample(WORDS, rng.randint(0, 3)),
        "items": [
            {
                "sku": f"{rng.choice('ABCD')}-{rng.randint(100, 999)}",
                "count": rng.randint(1, 20),
                "price": rng.randint(1, 900),
            }
            for _ in range(rng.randint(1, 3))
        ],
        "next": None,
    }
    return json.dumps(record, indent=rng.choice([None, 2])) + "\n"


def chat(rng: random.Random) -> str:
    """A conversation with an assistant."""
    name, thing, place = rng.choice(NAMES), rng.choice(WORDS), rng.choice(PLACES)
    number = rng.randint(2, 48)
    return (
        f"<|user|>\nhey, it's {name.lower()} again :) my {thing} still isn't here, ordered {number} days ago??\n"
        f"<|assistant|>\nHi {name}! Sorry to hear that. I can see the {thing} left {place} on Tuesday; it should "
        f"arrive within {number % 5 + 1} days. Shall I send you the tracking link?\n"
        f"<|user|>\nyes pls. also can u change the address to {rng.choice(PLACES)}, flat {number}?\n"
        f"<|assistant|>\nDone! The new address is saved. The link: https://track.example/{rng.randrange(10**6)}\n"
        f"<|user|>\n{rng.choice(['thx!!', 'great, thank you', 'ok lol', 'perfect'])} bye\n"
        f"<|assistant|>\nYou're welcome, {name}. Have a nice day!\n\n"
    )


def javascript(rng: random.Random) -> str:
    """A function of a web application."""
    thing, other = rng.sample(WORDS, 2)
    number = rng.randint(2, 99)
    upper = thing.capitalize()
    return (
        f"export async function load{upper}s({{ {other}Id, limit = {number} }} = {{}}) {{\n"
        f"  const response = await fetch(`/api/{thing}s?{other}=${{{other}Id}}&limit=${{limit}}`);\n"
        f"  if (!response.ok) {{\n    throw new Error(`{thing}s: ${{response.status}}`);\n  }}\n"
        f"  const {{ data }} = await response.json();\n"
        f"  return data\n    .filter(({{ {other} }}) => {other}?.count > {number % 7})\n"
        f"    .map((item, index) => ({{ ...item, key: `{thing}-${{index}}` }}));\n}}\n\n"
        f"const {thing}Store = new Map();\n"
        f"document.querySelector('#{thing}-list')?.addEventListener('click', (event) => {{\n"
        f"  event.preventDefault();\n  {thing}Store.set(event.target.dataset.{other}, Date.now());\n}});\n\n"
    )


def sql(rng: random.Random) -> str:
    """A query, or the definition of a table."""
    a, b = rng.sample(WORDS, 2)
    number = rng.randint(1, 900)
    if rng.random() < 0.3:
        return (
            f"CREATE TABLE IF NOT EXISTS {a}s (\n  id BIGSERIAL PRIMARY KEY,\n  {b}_id BIGINT NOT NULL REFERENCES "
            f"{b}s(id),\n  name VARCHAR({number}) NOT NULL,\n  amount NUMERIC(10, 2) DEFAULT 0,\n  created TIMESTAMPTZ "
            f"DEFAULT now()\n);\nCREATE INDEX idx_{a}s_{b} ON {a}s ({b}_id);\n\n"
        )
    return (
        f"SELECT {a[0]}.id, {a[0]}.name, COUNT(*) AS n, SUM({b[:2]}.amount) AS total\nFROM {a}s {a[0]}\n"
        f"LEFT JOIN {b}s {b[:2]} ON {b[:2]}.{a}_id = {a[0]}.id\nWHERE {a[0]}.created >= '2026-0{number % 9 + 1}-01' "
        f"AND {b[:2]}.amount > {number}\nGROUP BY 1\nHAVING COUNT(*) > {number % 6}\nORDER BY total DESC NULLS LAST\n"
        f"LIMIT {number % 50 + 1};\n\n"
    )


GREEK = {
    "who": [
        "Η δασκάλα",
        "Ο ψαράς",
        "Το παιδί",
        "Η γιατρός",
        "Ο γείτονας",
        "Η μητέρα",
        "Ο ναύτης",
        "Η μαθήτρια",
        "Ο κηπουρός",
    ],
    "does": [
        "διαβάζει",
        "βλέπει",
        "αγοράζει",
        "θυμάται",
        "ζωγραφίζει",
        "περιμένει",
        "φέρνει",
        "ακούει",
        "καθαρίζει",
    ],
    "what": [
        "το βιβλίο",
        "τη θάλασσα",
        "ένα ποδήλατο",
        "το γράμμα",
        "την παλιά εικόνα",
        "το ψωμί",
        "τα λουλούδια",
        "τη μουσική",
    ],
    "where": [
        "στην αγορά",
        "κοντά στο λιμάνι",
        "πίσω από το σπίτι",
        "στο χωριό",
        "κάτω από το δέντρο",
        "στον σταθμό",
    ],
    "when": [
        "κάθε πρωί",
        "το βράδυ",
        "τον χειμώνα",
        "μετά τη βροχή",
        "πριν από το φαγητό",
        "την Κυριακή",
    ],
}


def greek(rng: random.Random) -> str:
    """A sentence or two."""
    parts = {key: rng.choice(values) for key, values in GREEK.items()}
    ending = rng.choice(
        [
            ".",
            ", γιατί είναι χαρούμενος ο καιρός.",
            ", αλλά κανείς δεν το ξέρει.",
            f", {rng.randint(2, 30)} φορές.",
        ]
    )
    return f"{parts['who']} {parts['does']} {parts['what']} {parts['where']} {parts['when']}{ending} "


KINDS: dict[str, Callable[[random.Random], str]] = {
    "latex": latex,
    "json": as_json,
    "chat": chat,
    "javascript": javascript,
    "sql": sql,
    "greek": greek,
}


def text_of(kind: str, *, characters: int = 60_000, seed: int = 0) -> str:
    """Text of a kind.

    Args:
        kind: a key of `KINDS`.
        characters: at least so many.
        seed: of the draws.
    """
    rng, parts, size = random.Random(f"{kind} {seed}"), list[str](), 0
    while size < characters:
        parts.append(KINDS[kind](rng))
        size += len(parts[-1])
    return "".join(parts)
