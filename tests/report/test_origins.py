"""What made runs: what they share, and where they differ."""

import json

from fedmoe_jax.report.origins import (
    describe_origins,
    join_columns,
    made_by_columns,
    origin_of,
)
from fedmoe_jax.report.runs import load_run

from .fake_runs import make_run, write_run

ORIGIN = {
    "commit": "a1b2c3d4e5f6a7b8",
    "dirty": False,
    "fedmoe_jax": "0.2.0",
    "python": "3.11.7",
    "device": "cpu",
    "xla_flags": "",
}


def made_by(tmp_path, **changes):
    run, origin = make_run(tmp_path), ORIGIN | changes
    origins = [{"first_round": 1, "made_by": origin}]
    return run._replace(summary={"made_by": origin}, origins=origins)


def test_describe_origins_of_one_run_has_no_differences(tmp_path):
    alike, different = describe_origins([made_by(tmp_path)])
    assert alike == (
        "commit a1b2c3d4e · dirty no · fedmoe_jax 0.2.0 · python 3.11.7 · "
        "device cpu · xla_flags none"
    )
    assert different == ""
    unknown = made_by(tmp_path, commit=None, dirty=None)
    assert describe_origins([unknown])[0].startswith("fedmoe_jax 0.2.0")


def test_describe_origins_counts_the_runs_of_each(tmp_path):
    other = "c3d4" * 10
    runs = [made_by(tmp_path)] * 12 + [made_by(tmp_path, commit=other, dirty=None)] * 3
    alike, different = describe_origins([*runs, made_by(tmp_path, device="H100")])
    assert "commit" not in alike and "fedmoe_jax 0.2.0" in alike
    assert different == (
        "commit a1b2c3d4e (13 runs), c3d4c3d4c (3 runs); "
        "dirty no (13 runs), unknown (3 runs); device cpu (15 runs), H100 (1 run)"
    )


def test_a_run_in_progress_is_traced_by_its_own_file(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").unlink()
    (folder / "origins.json").write_text(
        json.dumps({"origins": [{"first_round": 1, "made_by": ORIGIN}]})
    )
    run = load_run(folder)
    assert not run.summary and origin_of(run) == ORIGIN
    assert describe_origins([run])[0].startswith("commit a1b2c3d4e")
    (folder / "origins.json").write_text("{")
    assert origin_of(load_run(folder)) == {}


def test_join_columns_says_what_varies(tmp_path):
    one, other = made_by(tmp_path), made_by(tmp_path, device="H100")
    assert join_columns([one, one]) == made_by_columns(one)
    joined = join_columns([one, other])
    assert joined == made_by_columns(one) | {"made_by.device": "varies"}
    assert join_columns([one, make_run(tmp_path)])["made_by.commit"] == "varies"


def test_describe_origins_knows_nothing_of_older_runs(tmp_path):
    early = make_run(tmp_path)
    assert origin_of(early) == {} and describe_origins([early]) == ("", "")
    alike, different = describe_origins([early, made_by(tmp_path)])
    assert alike and not different
    older = early._replace(summary={"num_rounds": 4})
    assert describe_origins([older]) == ("", "")
    alike, different = describe_origins([older, made_by(tmp_path)])
    assert not alike and "unknown (1 run)" in different


def resumed(tmp_path, *starts, **changes):
    """A run that began with changes and lost them at these rounds, one by one."""
    origins = [{"first_round": 1, "made_by": ORIGIN | changes}]
    for start, name in zip(starts, [*changes], strict=True):
        origin = origins[-1]["made_by"] | {name: ORIGIN[name]}
        origins.append({"first_round": start, "made_by": origin})
    return made_by(tmp_path)._replace(origins=origins)


FAST = "--xla_cpu_enable_fast_math=true"


def test_describe_origins_says_where_a_run_has_changed(tmp_path):
    alike, different = describe_origins([resumed(tmp_path, 5, xla_flags=FAST)])
    assert different == f"xla_flags {FAST} until round 4, then none (1 run)"
    assert alike.startswith("commit a1b2c3d4e") and "xla_flags" not in alike
    runs = [resumed(tmp_path, 5, 9, xla_flags=FAST, device="TPU"), made_by(tmp_path)]
    assert describe_origins(runs)[1] == (
        "device TPU until round 8, then cpu (1 run), cpu (1 run); "
        f"xla_flags {FAST} until round 4, then none (1 run), none (1 run)"
    )


def test_made_by_columns_have_the_last_process_and_what_was_otherwise(tmp_path):
    run = resumed(tmp_path, 5, 9, xla_flags=FAST, commit="f" * 40)
    columns = made_by_columns(run)
    assert columns["made_by.xla_flags"] == "" and columns["made_by.device"] == "cpu"
    assert columns["made_by.earlier"] == (
        f"rounds 1 to 4: commit={'f' * 40}, xla_flags={FAST}; "
        f"rounds 5 to 8: commit={'f' * 40}"
    )
    assert made_by_columns(made_by(tmp_path))["made_by.earlier"] == ""
    assert made_by_columns(make_run(tmp_path)) == {}


def test_origins_of_rounds_before_they_were_kept_are_unknown(tmp_path):
    run = made_by(tmp_path)
    early = {"first_round": 1, "made_by": {}}
    late = {"first_round": 3, "made_by": ORIGIN}
    run = run._replace(origins=[early, late])
    assert "device unknown until round 2, then cpu" in describe_origins([run])[1]
    assert "rounds 1 to 2: commit=unknown" in made_by_columns(run)["made_by.earlier"]
