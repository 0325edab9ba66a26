"""Loads a Mixture-of-Experts checkpoint whose layers have different numbers of experts.

Every model class of transformers is available from here under its own name, as a subclass that builds each decoder
layer while the config says that layer's number of experts (`num_routed_experts_per_layer` in config.json, by decoder
index). This file travels with such a checkpoint, so it imports nothing but transformers: `from_pretrained(...,
trust_remote_code=True)` finds it through `auto_map`.
"""

import contextlib
import functools
import importlib
import inspect
import sys
import threading

import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_building = threading.RLock()  # classes are patched while a model is built, one model at a time


def expert_counts(config):
    """Experts by decoder index as the config lists them; transformers' own `per_layer_config` is understood too."""
    listed = getattr(config, "num_routed_experts_per_layer", None)
    if listed:
        return dict(enumerate(listed))
    overrides = getattr(getattr(config, "_heterogeneity_spec", None), "per_layer_overrides", None) or {}
    return {layer: next((entry[key] for key in COUNT_KEYS if key in entry), None) for layer, entry in overrides.items()}


@contextlib.contextmanager
def expert_count(config, count):
    """Inside the block the shared config says `count` experts; a copy would miss what the model changes in it later."""
    fields = config.__dict__
    before = {key: fields[key] for key in COUNT_KEYS if count and isinstance(fields.get(key), int)}
    fields.update(dict.fromkeys(before, count))
    try:
        yield
    finally:
        fields.update(before)


def _counting(init, counts):
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs).arguments
        with expert_count(given["config"], counts.get(given["layer_idx"])):
            init(self, *args, **kwargs)

    return __init__


def _modules(base, config):
    """The modelling files of a class and of its text model, which a wrapper may have from another architecture."""
    text = type(config).__module__.replace(".configuration_", ".modeling_")
    with contextlib.suppress(ImportError):
        importlib.import_module(text)
    return [sys.modules[name] for name in dict.fromkeys((base.__module__, text)) if name in sys.modules]


@contextlib.contextmanager
def per_layer_experts(base, config):
    """Inside the block the decoder layers of a model class see their own number of experts while they are built;
    `config` is that of its text model."""
    counts = expert_counts(config)
    layers = [
        cls
        for cls in dict.fromkeys(
            cls for module in _modules(base, config) for cls in vars(module).values() if inspect.isclass(cls)
        )
        if issubclass(cls, GradientCheckpointingLayer)
        and {"config", "layer_idx"} <= set(inspect.signature(cls.__init__).parameters)
        and "__init__" in vars(cls)
    ]
    with _building:
        spec = config.__dict__.pop("_heterogeneity_spec", None)
        before = {cls: cls.__init__ for cls in layers}
        for cls in layers:
            cls.__init__ = _counting(cls.__init__, counts)
        try:
            yield
        finally:
            for cls, init in before.items():
                cls.__init__ = init
            if spec is not None:
                config.__dict__["_heterogeneity_spec"] = spec


@functools.cache
def ragged(base):
    """The subclass of a transformers model class that gives every layer its own number of experts; it keeps the base's
    name."""

    def __init__(self, config, *args, **kwargs):
        with per_layer_experts(base, config.get_text_config()):
            base.__init__(self, config, *args, **kwargs)

    body = {"__module__": __name__, "__init__": __init__, "__doc__": base.__doc__}
    for name in ("_can_set_attn_implementation", "_can_set_experts_implementation"):
        if hasattr(base, name):  # these read the source file of the class they are asked about
            body[name] = _asking(getattr(base, name))
    return type(base.__name__, (base,), body)


def _asking(ask):
    """A class method that gives the answer of another class's."""
    return classmethod(lambda cls: ask())


def __getattr__(name):
    if name.startswith("__") or not hasattr(transformers, name):
        raise AttributeError(name)
    return ragged(getattr(transformers, name))
