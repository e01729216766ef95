"""All rules of the TensorRT targets, and the table that tells which versions do not take a graph, and why."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from edgeprune.export.lint import Finding, LintContext, Rule
from edgeprune.export.lint.attention_op import attention_op
from edgeprune.export.lint.attention_pattern import attention_pattern
from edgeprune.export.lint.constant_inputs import constant_inputs
from edgeprune.export.lint.data_dependent_ops import data_dependent_ops
from edgeprune.export.lint.dynamic_dims import dynamic_dims
from edgeprune.export.lint.facts import Facts
from edgeprune.export.lint.float32_scores import float32_scores
from edgeprune.export.lint.foreign_domains import foreign_domains
from edgeprune.export.lint.gather_elements import gather_elements
from edgeprune.export.lint.ignored_attributes import ignored_attributes
from edgeprune.export.lint.int32_limits import int32_limits
from edgeprune.export.lint.int64_io import int64_io
from edgeprune.export.lint.known_operators import known_operators
from edgeprune.export.lint.known_types import known_types
from edgeprune.export.lint.layer_norm_form import layer_norm_form
from edgeprune.export.lint.local_functions import local_functions
from edgeprune.export.lint.loops import loops
from edgeprune.export.lint.name_collisions import name_collisions
from edgeprune.export.lint.opset_ceiling import opset_ceiling
from edgeprune.export.lint.plugin_fields import plugin_fields
from edgeprune.export.lint.quantized_attention import quantized_attention
from edgeprune.export.lint.quantized_gather import quantized_gather
from edgeprune.export.lint.quantized_products import quantized_products
from edgeprune.export.lint.quantized_tensors import is_one, quantized_tensors
from edgeprune.export.lint.same_types import same_types
from edgeprune.export.lint.shape_from_data import shape_from_data
from edgeprune.export.lint.tokens_shrink import tokens_shrink
from edgeprune.export.lint.topk_form import topk_form
from edgeprune.export.plan import Plan
from edgeprune.export.targets.tensorrt_versions import FAMILIES, LEAST, Family, as_numbers, family_of, first_that

# What a parser refuses or reads as something else.
PARSER_RULES: tuple[Rule, ...] = (
    opset_ceiling,
    known_types,
    known_operators,
    name_collisions,
    plugin_fields,
    local_functions,
    topk_form,
    constant_inputs,
    ignored_attributes,
    layer_norm_form,
    attention_op,
    same_types,
    int32_limits,
    quantized_tensors,
)
# What an engine of ours cannot be run with.
ENGINE_RULES: tuple[Rule, ...] = (foreign_domains, data_dependent_ops, shape_from_data, dynamic_dims, tokens_shrink)
# What only costs speed or agreement; a model of somebody else may have it.
FORM_RULES: tuple[Rule, ...] = (attention_pattern, gather_elements, float32_scores, loops, int64_io)
# What makes 8-bit kernels of what was quantized.
QUANTIZED_RULES: tuple[Rule, ...] = (quantized_products, quantized_attention, quantized_gather)


def tensorrt_rules(least: str = LEAST) -> tuple[Rule, ...]:
    """Return the rules a graph must obey that is to run on a version of TensorRT and newer ones.

    A graph of an opset or with types that version does not know, bfloat16 for one, was asked for as such: it is judged
    for the oldest version that knows them, and a quantized graph for one with strongly typed networks.
    """
    return (
        *(_at(rule, least) for rule in PARSER_RULES),
        *ENGINE_RULES,
        *(_of_emitted(_at(rule, least)) for rule in (*FORM_RULES, *QUANTIZED_RULES)),
    )


def why_not(model: onnx.ModelProto, plan: Plan | None) -> dict[str, list[str]]:
    """Return for each version the reasons its parser does not take a graph, each once; empty where it does."""
    context = LintContext(model, plan, ())
    return {
        version: list(dict.fromkeys(f.reason for rule in PARSER_RULES for f in rule(context.at(version))))
        for version in FAMILIES
    }


def merge_why_not(tables: Iterable[dict[str, list[str]]]) -> dict[str, list[str]]:
    """Return one table for all graphs of a bundle."""
    merged: dict[str, list[str]] = {version: [] for version in FAMILIES}
    for table in tables:
        for version, reasons in table.items():
            merged[version] += [reason for reason in reasons if reason not in merged[version]]
    return merged


def _at(rule: Rule, least: str) -> Rule:
    def judge(context: LintContext) -> list[Finding]:
        return rule(context.at(_oldest_that_reads(context.facts, least)))

    return judge


def _oldest_that_reads(facts: Facts, least: str) -> str:
    quantized = any(is_one(node) for node in facts.nodes)

    def reads(family: Family) -> bool:
        new_enough = as_numbers(family.version) >= as_numbers(family_of(least).version)
        new_enough = new_enough and (family.strong or not quantized)
        return new_enough and family.opset >= facts.opset and family.types.issuperset(facts.types.values())

    return first_that(reads) or least


def _of_emitted(rule: Rule) -> Rule:
    def judge(context: LintContext) -> list[Finding]:
        return [] if context.plan is None else rule(context)

    return judge
