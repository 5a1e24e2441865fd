"""What made runs: what they share, and where they differ."""

from fedmoe_jax.report.origins import describe_origins, origin_of

from .fake_runs import make_run

ORIGIN = {
    "commit": "a1b2c3d4e5f6a7b8",
    "dirty": False,
    "fedmoe_jax": "0.2.0",
    "python": "3.11.7",
    "device": "cpu",
    "xla_flags": "",
}


def made_by(tmp_path, **changes):
    run = make_run(tmp_path)
    return run._replace(summary={"made_by": ORIGIN | changes})


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


def test_describe_origins_knows_nothing_of_runs_in_progress_and_older(tmp_path):
    early = make_run(tmp_path)
    assert origin_of(early) == {} and describe_origins([early]) == ("", "")
    alike, different = describe_origins([early, made_by(tmp_path)])
    assert alike and not different
    older = early._replace(summary={"num_rounds": 4})
    assert describe_origins([older]) == ("", "")
    alike, different = describe_origins([older, made_by(tmp_path)])
    assert not alike and "unknown (1 run)" in different
