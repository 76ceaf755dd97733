#!/bin/bash
# Tables and figures of a campaign: from the results.json files of run.sh into report/, this folder's README and
# the project's.
#
#   benchmarks/h200/publish.sh out/*/*/results.json
set -eu
[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
HERE=$(cd "$(dirname "$0")" && pwd)
${BENCH:-pt2-bench} report "$@" --out "$HERE/report" --published "$HERE/published.yaml" \
    --fill "$HERE/README.md" --fill "$HERE/../../README.md"
