#!/bin/sh
# install_cuda.sh TARGET: what compiling for a target needs, in a manylinux_2_28 container.
# cpu needs nothing; cu130 needs nvcc and the runtime of CUDA 13.0.
set -eu
case "${1:-}" in
  cpu) exit 0 ;;
  cu[0-9][0-9][0-9]) ;;
  *) echo "install_cuda.sh: expected cpu or cuNNN, got '${1:-}'" >&2; exit 2 ;;
esac
digits=${1#cu}
version=${digits%?}-${digits#??}
machine=$(uname -m)
[ "$machine" = aarch64 ] && machine=sbsa # NVIDIA's name for 64-bit Arm servers
dnf -y install dnf-plugins-core
dnf config-manager --add-repo \
  "https://developer.download.nvidia.com/compute/cuda/repos/rhel8/$machine/cuda-rhel8.repo"
dnf -y install "cuda-nvcc-$version" "cuda-cudart-devel-$version" "cuda-cccl-$version"
"/usr/local/cuda-${digits%?}.${digits#??}/bin/nvcc" --version
