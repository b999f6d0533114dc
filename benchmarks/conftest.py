"""What pytest-benchmark records: quartiles rather than every sample, and nothing that names the
machine."""

from __future__ import annotations

_MACHINE = ("processor", "machine", "python_version", "cpu")
_TIMES = ("median", "q1", "q3", "min")


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    machine = output_json["machine_info"]
    output_json["machine_info"] = {name: machine[name] for name in _MACHINE if name in machine}
    cpu = output_json["machine_info"].get("cpu", {})
    output_json["machine_info"]["cpu"] = {
        name: cpu[name] for name in ("brand_raw", "count") if name in cpu
    }
    output_json["commit_info"] = {
        name: output_json["commit_info"].get(name) for name in ("id", "dirty")
    }
    output_json["benchmarks"] = [
        {
            "name": record["name"],
            **record["extra_info"],
            **{f"{name}_us": round(record["stats"][name] * 1e6, 2) for name in _TIMES},
        }
        for record in output_json["benchmarks"]
    ]
