#!/usr/bin/env bash
# What the GitHub Action runs: `regraft check` of the paths in CHECK_PATH, one a line, for CHECK_FOR and over CHECK_MODEL
# where they are not empty. What it says, errors too, goes to the log and to the job's summary, JSON into a file. The
# exit status is that of `regraft check`.
set -euo pipefail

: "${ROOM:?the environment that regraft is in}"
mapfile -t sources < <(printf '%s\n' "${CHECK_PATH:-.}" | sed '/^[[:space:]]*$/d')
options=(--offline --progress none --accept-unproven)
[[ -z "${CHECK_FOR:-}" ]] || options+=(--for "$CHECK_FOR")
[[ -z "${CHECK_MODEL:-}" ]] || options+=(--model "$CHECK_MODEL")
report="$ROOM/report.json"

status=0
"$ROOM/bin/regraft" check "${options[@]}" --verbose -- "${sources[@]}" 2>&1 | tee "$ROOM/report.txt" || status=$?
# The same again for programs; what it found is known and was said, so its status and its words are left out.
"$ROOM/bin/regraft" check "${options[@]}" --json -- "${sources[@]}" > "$report" 2> /dev/null || true

[[ -z "${GITHUB_OUTPUT:-}" ]] || echo "report=$report" >> "$GITHUB_OUTPUT"
if [[ -n "${GITHUB_STEP_SUMMARY:-}" ]]; then
  { echo '### regraft check'; echo '```text'; cat "$ROOM/report.txt"; echo '```'; } >> "$GITHUB_STEP_SUMMARY"
fi
exit "$status"
