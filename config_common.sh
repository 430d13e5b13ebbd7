# shellcheck shell=bash
# What all systems share. Sourced by config_<system>.sh; every name is a setting of mxresnet (python -m mxresnet --help)
# or of a library.
export MXNET_SUBGRAPH_VERBOSE=0
