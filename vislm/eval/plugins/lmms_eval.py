"""The plug-in for lmms-eval: ``lmms_eval --model vislm --model_args pretrained=...,prune="flowcut:keep=64" ...``.

lmms-eval finds :func:`manifest` through the entry-point group ``lmms_eval.models``. It logs a plug-in that cannot be
loaded and goes on, so that it looks like an unknown model; ``python -m vislm.eval.plugins.lmms_eval`` tells the reason.
"""

from __future__ import annotations

from typing import Any

MODEL_ID = "vislm"
CLASS_PATH = "vislm.eval.plugins.lmms_eval_model.Vislm"


def manifest() -> Any:
    """Return lmms-eval's ``ModelManifest`` of this package."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(model_id=MODEL_ID, simple_class_path=CLASS_PATH)


def self_test(model_args: str = "") -> str:
    """Resolve the model as lmms-eval does, build it from ``model_args``, answer one question; return the answer."""
    from lmms_eval.models.registry_v2 import ModelRegistryV2  # pyright: ignore[reportMissingImports]
    from PIL import Image

    from vislm.eval.plugins.requests import Request

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    model = registry.get_model_class(MODEL_ID).create_from_arg_string(model_args, {"batch_size": 1})
    model.task_dict = {"self-test": {"test": [None]}}
    picture = Image.linear_gradient("L").convert("RGB")
    arguments = ("Describe the image.", {"max_new_tokens": 8}, lambda _: [picture], 0, "self-test", "test")
    (answer,) = model.generate_until([Request(arguments)])
    model.clean()
    return answer


if __name__ == "__main__":
    import sys

    print(self_test(*sys.argv[1:2]))
