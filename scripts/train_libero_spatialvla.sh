#!/usr/bin/env bash
# Fine-tune SpatialVLA (arXiv 2501.15830) on one LIBERO suite, or on all of them.
#
#   scripts/train_libero_spatialvla.sh spatial               # or object, goal, 10, joint
#   MODE=full scripts/train_libero_spatialvla.sh spatial     # all weights instead of LoRA; several GPUs share one copy
#   ALIGN=1 scripts/train_libero_spatialvla.sh spatial       # with VGGT alignment of the image tokens
#   NPROC=4 scripts/train_libero_spatialvla.sh goal --grad_accumulation_steps 2 --run_id_note mine
#   scripts/train_libero_spatialvla.sh spatial --resume auto # starts, and after a crash goes on where it stopped
#
# Rank, alpha, rates, schedule and 256 samples per update are those of the authors' fine-tuning scripts for Bridge. What
# they used for LIBERO was never published: updates and the use of adapted bins (ADAPT=0 leaves them out) are our guess.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }

case "${1:-}" in
  spatial | object | goal | 10) dataset="libero_$1_no_noops" ;;
  joint) dataset="libero_4_task_suites_no_noops" ;;
  *) usage ;;
esac
shift

case "${MODE:-lora}" in
  lora) mode=(--use_lora True --lora_rank 32 --lora_alpha 32 --learning_rate 5e-4 --merge_lora_during_training False) ;;
  full) mode=(--use_lora False --learning_rate 2e-5) ;;
  *) usage ;;
esac

adapt=()
if [[ "${ADAPT:-1}" == 1 ]]; then
  gaussians="${RUNS:-runs}/gaussians-$dataset.json"
  if [[ ! -f "$gaussians" ]]; then
    mkdir -p "${RUNS:-runs}"
    python scripts/fit_action_gaussians.py --data_root_dir "${DATA:-data}" --dataset_name "$dataset" --output "$gaussians"
  fi
  adapt=(--adapt_emb "$gaussians" --adpt_feature True)
fi

entry=(vla-scripts/finetune.py)
if [[ "${ALIGN:-0}" == 1 ]]; then
  # Three quarters up, as layer 24 of 32 in the paper.
  entry=(vla-scripts/finetune_align.py --vggt_path "${VGGT:-ckpts/vggt/model.pt}" --vla_layers_align 20
    --vggt_layers_align -1 --align_loss_coeff 0.5 --use_vlm_norm True --use_vggt_pe True)
fi

# LAUNCH is for several machines, see train_libero_spatialvla.slurm.
read -ra launch <<< "${LAUNCH:-torchrun --standalone --nnodes 1 --nproc-per-node ${NPROC:-8}}"
exec "${launch[@]}" "${entry[@]}" \
  --vla_path "${VLA:-IPEC-COMMUNITY/spatialvla-4b-224-pt}" \
  --data_root_dir "${DATA:-data}" \
  --dataset_name "$dataset" \
  --run_root_dir "${RUNS:-runs}" \
  "${mode[@]}" \
  ${adapt[@]+"${adapt[@]}"} \
  --batch_size 32 \
  --weight_decay 0 \
  --scheduler LinearLR \
  --lr_warmup_steps 50 \
  --max_steps 10000 \
  --save_freq 2000 \
  --gradient_checkpointing True \
  --image_aug True \
  "$@"
