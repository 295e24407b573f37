"""Our CUDA functions match NVIDIA's bindings."""

from __future__ import annotations

import pytest

from server.engines.tensorrt.cuda import STICKY, Cuda, CudaError, GpuUnavailable

# Made-up arguments for every method of Cuda.
CALLS: dict[str, tuple[int, ...]] = {
    "gpu": (),
    "allocate_pinned": (100,),
    "free_pinned": (4096,),
    "allocate": (100,),
    "free": (4096,),
    "copy_to_device": (4096, 8192, 100, 7),
    "copy_to_host": (4096, 8192, 100, 7),
    "create_stream": (),
    "destroy_stream": (7,),
    "create_event": (),
    "destroy_event": (7,),
    "record_event": (7, 8),
    "wait_event": (7,),
    "synchronize": (7,),
    "begin_capture": (7,),
    "end_capture": (7,),
    "launch_graph": (7, 8),
    "destroy_graph": (7,),
}


def test_all_sticky_errors_exist_in_cuda() -> None:
    from cuda.bindings import runtime

    assert set(runtime.cudaError_t.__members__) >= STICKY


def test_the_bindings_accept_the_arguments_of_every_call() -> None:
    """Without a driver, each call checks its arguments and then fails for lack of a driver."""
    from cuda.bindings import runtime

    try:
        Cuda()
    except GpuUnavailable:
        pass
    else:
        pytest.skip("with a GPU, the made-up handles would be used")
    bindings = Cuda.__new__(Cuda)
    bindings._api = runtime
    public = {name for name in vars(Cuda) if not name.startswith("_")}
    assert set(CALLS) == public, "add each new method to CALLS"
    for name, arguments in CALLS.items():
        with pytest.raises(CudaError, match="InsufficientDriver|NoDevice"):
            getattr(bindings, name)(*arguments)
    graph = runtime.cudaGraph_t(7)  # used in the rest of end_capture
    for name, given in (("cudaGraphInstantiate", (graph, 0)), ("cudaGraphDestroy", (graph,))):
        with pytest.raises(CudaError, match="InsufficientDriver|NoDevice"):
            bindings._call(name, *given)
    for handle in (runtime.cudaStream_t, runtime.cudaEvent_t, runtime.cudaGraphExec_t):
        assert int(handle(7)) == 7, "handles are plain numbers"
