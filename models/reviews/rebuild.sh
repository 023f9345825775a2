#!/bin/sh
# Rebuilds everything in this folder from data/rated_snippets.jsonl with the project's own commands.
# From the top of a checkout, in the environment that mlx-ppo is installed in:
#     sh models/reviews/rebuild.sh
# About a quarter of an hour on two CPU cores.
set -eu
here=$(dirname "$0")
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
python "$here/prepare.py"
mlx-ppo sft "$here/../../configs/reviews-sft.toml" --set "run.folder=$runs"
cp "$runs/reviews-sft/model/model.safetensors" "$here/"
mlx-ppo reward "$here/../../configs/reviews-reward.toml" --set "run.folder=$runs"
cp "$runs/reviews-reward/reward/"* "$here/reward/"
