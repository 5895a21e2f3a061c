"""Invented records of a weaving mill: text in a house style that no language model has met before."""

import random

MACHINES = ["LOOM", "JACQ", "WARP", "SLEY"]
YARNS = ["cotton 40/2", "linen 16/1", "merino 28/2", "tencel 30/1", "silk 60/2"]
FAULTS = ["weft break", "warp break", "mispick", "slack selvedge"]
PEOPLE = ["M. Okafor", "J. Lindqvist", "P. Castellanos", "R. Yamamoto", "S. Abernathy"]
TOWNS = ["Galashiels", "Como", "Mulhouse", "Norrkoping", "Coimbatore"]
CLOTHS = [("HB", "herringbone"), ("TW", "twill"), ("SA", "satin"), ("PL", "plain weave"), ("DA", "damask")]


def machine_record(rng: random.Random, day: str) -> str:
    """Write the record of one machine's shift.

    Args:
        rng: The source of every choice.
        day: The date on the record.

    Returns:
        The record, several lines without a blank one.
    """
    first, second = rng.sample(FAULTS, 2)
    counts = rng.randint(0, 4), rng.randint(0, 4)
    state = "attention" if sum(counts) > 4 else "in order"
    return (
        f"#RUN {day} | {rng.choice(MACHINES)}-{rng.randint(1, 24):02d} | shift {rng.choice('ABC')}\n"
        f"  yarn :: {rng.choice(YARNS)} ; picks/cm :: {rng.randint(14, 30)} ; hand :: {rng.choice(PEOPLE)}\n"
        f"  stops :: {sum(counts)} <{first} = {counts[0]}> <{second} = {counts[1]}>\n"
        f"  state :: {state} ~ signed off by the shift lead"
    )


def order_record(rng: random.Random, day: str) -> str:
    """Write the record of one order of cloth.

    Args:
        rng: The source of every choice.
        day: The date on the record.

    Returns:
        The record, several lines without a blank one.
    """
    lines = [f"#ORD {day} | buyer in {rng.choice(TOWNS)} | taken by {rng.choice(PEOPLE)}"]
    for number, (code, cloth) in enumerate(rng.sample(CLOTHS, rng.randint(1, 3)), start=1):
        length = rng.randint(2, 9) * 10
        lines.append(f"  item {number} :: {code}/{cloth} ; width :: 150 cm ; length :: {length} m")
    lines.append("  terms :: 30 days net ~ goods remain with the mill until paid in full")
    return "\n".join(lines)


def stock_record(rng: random.Random, day: str) -> str:
    """Write the record of one count of the yarn store.

    Args:
        rng: The source of every choice.
        day: The date on the record.

    Returns:
        The record, several lines without a blank one.
    """
    lines = [f"#STK {day} | bay {rng.choice('NESW')}{rng.randint(1, 6)} | counted by {rng.choice(PEOPLE)}"]
    for yarn in rng.sample(YARNS, rng.randint(2, 3)):
        cones = rng.randint(1, 9)
        note = "reorder at once" if cones < 3 else "enough on hand"
        lines.append(f"  {yarn} :: {cones} crates ~ {note}")
    return "\n".join(lines)


def record_batch(seed: int) -> str:
    """Write the records of a few days in one season.

    Args:
        seed: The number that determines the whole batch.

    Returns:
        Sixteen records, separated by blank lines.
    """
    rng = random.Random(seed)
    month = f"{rng.randint(2031, 2039)}.{rng.randint(1, 12):02d}"
    days = sorted(rng.randint(1, 28) for _ in range(16))
    kinds = (machine_record, order_record, stock_record)
    return "\n\n".join(rng.choice(kinds)(rng, f"{month}.{day:02d}") for day in days)
