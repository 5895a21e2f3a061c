#!/bin/sh
# One replica over several machines, on vLLM's Ray executor: tensor parallelism over two machines of eight GPUs each.
#
# Each machine needs the same environment (vLLM, weft, "ray[default]"), and mixture and base at the same paths, on
# shared storage or copied. First the cluster:
#
#   ray start --head                      on this machine
#   ray start --address THIS_MACHINE:6379 on the other
#
# then, on this machine: examples/serve/tensor_parallel_ray.sh /shared/my-mixture --api-key secret
exec weft serve "$@" --host 0.0.0.0 --tensor-parallel-size 16 --distributed-executor-backend ray
