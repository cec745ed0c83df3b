#!/usr/bin/env bash
# Installs the pre-commit hook from this clone, as pre-commit does for a user, and runs it in a repository with an
# adapter that does not load as it is, and with the one that regraft makes of it. Needs regraft,
# pre-commit, git and PyPI.
set -euo pipefail
for program in regraft pre-commit git; do
  command -v "$program" > /dev/null || { echo "$program is not on the path" >&2; exit 2; }
done

root=$(cd "$(dirname "$0")/.." && pwd)
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
export PRE_COMMIT_HOME="$room/home"
mkdir "$room/repository"
cd "$room/repository"
git init -q
cp -r "$root/tests/golden/cases/mixtral__gud_attn" old
git add .

hook() { pre-commit try-repo "$root" regraft-check --files "$1/adapter_model.safetensors"; }
if hook old; then
  echo "an adapter that does not load as it is has passed" >&2
  exit 1
fi
# What the hook says to run.
regraft convert old new --to transformers-v5
git add .
hook new
