"""The list of claims, `results/claims.toml`, which says how one is written."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fedmoe_jax.options import UserError


class Claim(NamedTuple):
    """One claim, as the list has it; `results/claims.toml` says how it is written.

    Attributes:
      id: by which pages quote it.
      text: a sentence, or empty: "A leads B". {leads} and {gains} are filled in by
        what the number says, {id} by the number of another claim.
      study: a folder of `results/`; empty for a struck claim without a number.
      measure: an accuracy, `global` or `personal_prior`; else a key of `MEASURES`.
      a: a row of the study's `table.md`.
      b: the row that is taken from it; empty: the number is the mean of `a`.
      less: two rows, whose difference is taken from that of `a` and `b`.
      rounds: first and last, whose evaluations count; empty: those of final numbers.
      overturn: the outcome that would overturn it.
      struck: the date on which it was struck out; empty while it stands.
      reason: of that.
    """

    id: str
    text: str = ""
    study: str = ""
    measure: str = ""
    a: str = ""
    b: str = ""
    less: tuple[str, ...] = ()
    rounds: tuple[int, ...] = ()
    overturn: str = ""
    struck: str = ""
    reason: str = ""


def read_claim(entry: Mapping[str, Any], section: Mapping[str, Any]) -> Claim:
    """A claim of the list, with the study and the measure that its section names.

    Raises:
      UserError: it has a field that no claim has, or lacks one.
    """
    shared = {k: section[k] for k in ("study", "measure") if k in section}
    values = {**shared, **entry} if "a" in entry else dict(entry)
    unknown = sorted(values.keys() - set(Claim._fields))
    if unknown or "id" not in values:
        raise UserError(
            f"claims: {unknown[0] if unknown else 'a claim without id'!r} is not "
            f"allowed; allowed: {', '.join(Claim._fields)}"
        )
    claim = Claim(**values)
    needed = (
        ["reason", "text"] if claim.struck else ["overturn", "study", "measure", "a"]
    )
    for name in needed:
        if not getattr(claim, name):
            raise UserError(f"claim {claim.id}: {name} is empty; allowed: a text")
    for name in ("less", "rounds"):
        if len(getattr(claim, name)) not in (0, 2):
            raise UserError(
                f"claim {claim.id}: {name}={getattr(claim, name)}; allowed: two"
            )
    return claim._replace(struck=str(claim.struck))


def expand(claim: Claim, short: Mapping[str, str]) -> Claim:
    """The claim with the short names of its study's rows written out."""

    def whole(label: str) -> str:
        for name, change in short.items():
            label = label.replace(f"{{{name}}}", change)
        return label

    less = tuple(map(whole, claim.less))
    return claim._replace(a=whole(claim.a), b=whole(claim.b), less=less)


def list_claims(listed: Mapping[str, Any]) -> dict[str, Claim]:
    """The claims of a list, by id.

    Raises:
      UserError: see `read_claim`; or an id is used twice.
    """
    claims: dict[str, Claim] = {}
    for section in listed["sections"]:
        for entry in section["claims"]:
            claim = read_claim(entry, section)
            if claim.id in claims:
                raise UserError(f"claim {claim.id} is there twice; allowed: one")
            known = listed["studies"]
            if claim.study and claim.study not in known:
                raise UserError(
                    f"claim {claim.id}: study {claim.study!r} is not listed; allowed: "
                    f"{', '.join(known)}"
                )
            short = known[claim.study].get("short", {}) if claim.study else {}
            claims[claim.id] = expand(claim, short)
    return claims
