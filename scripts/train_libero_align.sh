#!/usr/bin/env bash
# The paper's training commands (Spatial Forcing, arXiv 2510.12276): one run per LIBERO suite, and the joint one.
#
#   scripts/train_libero_align.sh spatial               # or object, goal, 10, joint
#   NPROC=4 scripts/train_libero_align.sh goal --save_freq 5000 --run_id_note mine
#   scripts/train_libero_align.sh spatial --resume auto # starts, and after a crash goes on where it stopped
#
# The same settings without a launcher: recipes/libero_*_align.yaml (prismo train --config_path ...).
#
# Published runs: 8 GPUs, batch 8 each (64 per update), 150,000 updates, rate 5e-4 and a tenth of it from 100,000 on.
# With fewer GPUs keep 64 per update: --grad_accumulation_steps 2 on four of them. OpenVLA-OFT found 50,000 updates best
# for the goal suite.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }

case "${1:-}" in
  spatial | object | goal | 10) dataset="libero_$1_no_noops" ;;
  joint) dataset="libero_4_task_suites_no_noops" ;;
  *) usage ;;
esac
shift

exec torchrun --standalone --nnodes 1 --nproc-per-node "${NPROC:-8}" vla-scripts/finetune_align.py \
  --vla_path "${VLA:-openvla/openvla-7b}" \
  --vggt_path "${VGGT:-ckpts/vggt/model.pt}" \
  --data_root_dir "${DATA:-data}" \
  --dataset_name "$dataset" \
  --run_root_dir "${RUNS:-runs}" \
  --use_l1_regression True \
  --use_diffusion False \
  --use_film False \
  --num_images_in_input 2 \
  --use_proprio True \
  --vla_layers_align 24 \
  --vggt_layers_align -1 \
  --align_loss_coeff 0.5 \
  --use_vlm_norm True \
  --use_vggt_pe True \
  --pooling_func bilinear \
  --batch_size 8 \
  --learning_rate 5e-4 \
  --num_steps_before_decay 100000 \
  --max_steps 150005 \
  --save_freq 10000 \
  --save_latest_checkpoint_only False \
  --image_aug True \
  --lora_rank 32 \
  --merge_lora_during_training False \
  "$@"
