"""What memory can do here, in a process of its own; prints JSON: GB/s of each sweep, five times.

`report` runs it every few minutes among the contenders, because on a shared machine bandwidth changes
by the minute. The sweeps are `fastce.bandwidth`'s, as in ``fastce bench``.
"""

from __future__ import annotations

import argparse
import json

from fastce import bandwidth

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure memory bandwidth; prints JSON.")
    parser.add_argument("--threads", type=int, required=True)
    print(json.dumps(bandwidth.sweeps(parser.parse_args().threads)))
