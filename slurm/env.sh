# This shell, for the site of VHS_CLUSTER (bash):
#
#     export VHS_CLUSTER=example             # configs/clusters/example.yaml, or the path of such a file
#     . slurm/env.sh [--stage STAGE] [--ranks N]
#
# On a login node: sets SBATCH_*, which sbatch reads, and VHS_*, as `vhs cluster-env` prints them; `vhs` must be on the PATH. A job that is submitted
# from there has them too, so in a job only the environment is activated. Without --stage: the resources of the small job that drives a run.
if [ -z "${SLURM_JOB_ID:-}" ] || [ -z "${VHS_PYTHON:-}" ]; then
    VHS_EXPORTS=$(vhs cluster-env "${VHS_CLUSTER:?is not set: the name of a site, a file of configs/clusters}" "$@") || return 1
    eval "$VHS_EXPORTS"
    unset VHS_EXPORTS
fi
if [ -n "${SLURM_JOB_ID:-}" ]; then
    VHS_STRICT=$-
    set +eu # what makes an environment (conda, modules) names variables that are not set, and fails on the way
    eval "$VHS_SETUP"
    case $VHS_STRICT in *e*) set -e ;; esac
    case $VHS_STRICT in *u*) set -u ;; esac
fi
eval "PYTHON=($VHS_PYTHON)" # arrays: the Python of a node with what goes before it,
VHS=("${PYTHON[@]}" -P -m jobs.cli) # and vhs by it; a jobs.py in the current folder is not ours
