"""The table of what a service takes to start."""

from benchmarks.bench_start import Start, table


def test_table_has_the_median_and_the_extremes() -> None:
    runs = [Start(ready, 10 * ready, 0.2, 5.0, {"Gatekeeper": 150.0}) for ready in (30.0, 20.0, 25.0)]
    lines = table(runs).splitlines()
    assert lines[0].split() == ["median", "lowest", "highest"]
    assert lines[1].split() == ["ready_s", "25.00", "s", "20.00", "s", "30.00", "s"]
    assert lines[2].split() == ["processor_s", "250.00", "s", "200.00", "s", "300.00", "s"]
    assert lines[-1].split() == ["resident", "Gatekeeper", "150", "MB", "150", "MB", "150", "MB"]
