"""`python -m faults`: the campaign, a line for each part; exit code 1 if anything happened that must not."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from faults.campaign import PARTS, SHARES, Campaign, seeds_of


@click.command()
@click.option("--seed", default=1, show_default=True, type=click.IntRange(0), help="Another one tries other things.")
@click.option(
    "--minutes", default=15.0, show_default=True, help="Of all parts together; making what they need is extra."
)
@click.option("--part", "parts", multiple=True, type=click.Choice([*PARTS]), help="Only this one; several times.")
@click.option("--only", "seeds", multiple=True, type=int, help="Only this seed of a part: what a fault was found with.")
def main(seed: int, minutes: float, parts: tuple[str, ...], seeds: tuple[int, ...]) -> None:
    """Damage, kill, fill and race, and look whether the product holds."""
    if seeds and len(parts) != 1:
        raise click.UsageError("--only takes seeds of one --part")
    parts = parts or tuple(PARTS)
    faults = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, Campaign(Path(folder)) as campaign:
        for part in parts:
            seconds = float("inf") if seeds else 60 * minutes * SHARES[part] / sum(SHARES[other] for other in parts)
            tally = campaign.run(part, seeds or seeds_of(seed), seconds)
            click.echo(tally.line())
            for number, text in tally.faults.items():
                click.echo(f"\n--- {part} {number}\n{text}\n")
            faults += len(tally.faults)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
