"""TR-GRPO's loss for verl (written for 0.9.1), registered by name. Needs this package beside verl on every worker.

    VERL_USE_EXTERNAL_MODULES=tr_grpo_verl PYTHONPATH=examples/scale-out python -m verl.trainer.main_ppo \
        algorithm.adv_estimator=grpo actor_rollout_ref.actor.policy_loss.loss_mode=tr_grpo \
        actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean ...

The clip is that of actor.clip_ratio_low, clip_ratio_high and clip_ratio_c. verl adds its KL term outside of this
function, where no token weight reaches it: leave actor.use_kl_loss off.
"""

import torch
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

from lite_trgrpo.objective import clipped_gain, token_weights


@register_policy_loss("tr_grpo")
def tr_grpo(
    old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None, rollout_is_weights=None
):
    """All [B, T]: J = w min(r A, clip(r) A), the offset weights, the weight outside of the clip."""
    weights = token_weights(log_prob)
    ratio = torch.exp((log_prob - old_log_prob).clamp(-20, 20))
    gain = weights * clipped_gain(ratio, advantages, config.clip_ratio_low, config.clip_ratio_high, config.clip_ratio_c)
    if rollout_is_weights is not None:
        gain = gain * rollout_is_weights
    loss = agg_loss(loss_mat=-gain, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
    mean_weight = (weights * response_mask).sum() / response_mask.sum().clamp(min=1)
    return loss, {"actor/weight_mean": mean_weight.item()}
