"""Plants mistakes in the formula files, one at a time; the tests must catch every one.

    python -m tools.mutate

Each mutant is a process that imports the project with one piece of text replaced, in which the
tests of the mathematics are run, until one fails. Run it whenever one of the formula files changes,
and add a mutant for each new formula. Exit code 1 if a mutant survives; takes a few minutes.
"""

import concurrent.futures
import contextlib
import gc
import importlib.machinery
import importlib.util
import multiprocessing
import os
import pathlib
import pkgutil
import sys
import tempfile

import PIL
import pytest

# Libraries that the tests import and no mutant changes; the mutants' processes are forked after they are imported.
PRELOAD = ["jax", "flax.linen", "optax", "orbax.checkpoint", "grain", "ml_collections", "scipy.stats", "tensorboardX"]
PRELOAD += ["tqdm", "pytest", "PIL.ImageOps"]
PRELOAD += [f"PIL.{name}" for _, name, _ in pkgutil.iter_modules(PIL.__path__) if name.endswith("Plugin")]
QUIETLY = ["-x", "-q", "--tb=no", "-n0", "-p", "no:cacheprovider", "-p", "no:anyio"]
ROOT = pathlib.Path(__file__).parent.parent
# {test that should catch them: [(module, text that stands in it exactly once, what replaces it)]}; all tests of these
# files follow if it does not.
MUTANTS = {
    "tests/test_schedule.py::test_arrays_of_the_rough_schedule": [
        ("schedule", "np.concatenate([[0.0], beta_squared])", "np.concatenate([beta_squared, [0.0]])"),
        ("schedule", "np.cumprod(1 - beta_squared)", "np.cumprod(np.sqrt(1 - beta_squared))"),
        ("schedule", "np.sqrt(square)", "square"),
    ],
    "tests/test_schedule.py::test_arrays_are_rounded_to_float32_once": [
        ("schedule", "np.cumprod(1 - beta_squared)", "np.cumprod(1 - beta_squared, dtype=np.float32)"),
        ("schedule", "np.arange(1, num_steps + 1)", "np.arange(num_steps)"),
        ("schedule", "np.linspace(start, end, num_steps)", "np.linspace(start, end, num_steps + 1)[1:]"),
    ],
    "tests/test_schedule.py::test_beta_squared_out_of_range_is_rejected": [
        ("schedule", "(beta_squared < 1)", "(beta_squared <= 1)"),
    ],
    "tests/test_schedule.py::test_ho_linear": [
        ("schedule", "np.linspace(start, end, num_steps)", "np.linspace(start**0.5, end**0.5, num_steps) ** 2"),
    ],
    "tests/test_schedule.py::test_cosine": [
        ("schedule", "* np.pi / 2) ** 2", "* np.pi / 2)"),
        ("schedule", "0.999)", "0.9999)"),
        ("schedule", "+ 0.008) / 1.008", "+ 0.0) / 1.008"),
    ],
    "tests/test_schedule.py::test_sigma_posterior_is_the_conditional_standard_deviation": [
        ("schedule", "s.beta_bar[:-1] / s.beta_bar[1:]", "s.beta_bar[1:] / s.beta_bar[:-1]"),
        ("schedule", "s.beta[1:] * s.beta_bar[:-1]", "s.beta[:-1] * s.beta_bar[:-1]"),
    ],
    "tests/test_schedule.py::test_steps_that_are_no_count_are_rejected": [
        ("schedule", "low <= array.min()", "low - 1 <= array.min()"),
    ],
    "tests/test_process.py::test_repeated_steps_are_the_forward_process": [
        ("process", "s.alpha[t] * x_prev + s.beta[t] * eps", "s.alpha[t] * x_prev + s.beta[t] ** 2 * eps"),
        ("process", "s.alpha[t] * x_prev", "s.alpha[t - 1] * x_prev"),
        (
            "process",
            "s.alpha_bar[t] * x_0 + s.beta_bar[t] * eps_bar",
            "s.alpha_bar[t] * x_0 + s.beta_bar[t - 1] * eps_bar",
        ),
    ],
    "tests/test_process.py::test_step_noise_is_the_conditional_expectation": [
        ("process", "s.beta[t] / s.beta_bar[t] * eps_bar", "s.beta[t] * s.beta_bar[t] * eps_bar"),
        ("process", "s.beta[t] / s.beta_bar[t] * eps_bar", "s.beta[t] / s.beta_bar[t - 1] * eps_bar"),
        ("process", "s.alpha_bar[t] * x_0) / s.beta_bar[t]", "s.alpha_bar[t] * x_0) / s.beta_bar[t] ** 2"),
    ],
    "tests/test_process.py::test_reverse_step_inverts_forward_step": [
        ("process", "(x_t - s.beta[t] * eps) / s.alpha[t]", "(x_t + s.beta[t] * eps) / s.alpha[t]"),
        ("process", "(x_t - s.beta[t] * eps) / s.alpha[t]", "x_t / s.alpha[t] - s.beta[t] * eps"),
    ],
    "tests/test_process.py::test_reverse_step_adds_its_noise": [
        ("process", "s.alpha[t] + noise", "s.alpha[t] - noise"),
    ],
    "tests/test_process.py::test_predictions_invert_forward": [
        ("process", "s.beta_bar[t] * eps_bar) / s.alpha_bar[t]", "s.beta_bar[t] * eps_bar) / s.alpha[t]"),
    ],
    "tests/test_process.py::test_posterior_mean_is_gaussian_conditioning": [
        ("process", "s.alpha_bar[t - 1] * s.beta[t] ** 2", "s.alpha_bar[t] * s.beta[t] ** 2"),
        ("process", "s.beta_bar[t - 1] ** 2 * x_t", "s.beta_bar[t] ** 2 * x_t"),
    ],
    "tests/test_process.py::test_velocity_is_inverted": [
        ("process", "s.alpha_bar[t] * eps_bar - s.beta_bar[t] * x_0", "s.alpha_bar[t] * eps_bar + s.beta_bar[t] * x_0"),
        ("process", "s.alpha_bar[t] * v + s.beta_bar[t] * x_t", "s.alpha_bar[t] * v - s.beta_bar[t] * x_t"),
        ("process", "s.alpha_bar[t] * v + s.beta_bar[t] * x_t", "s.beta_bar[t] * v + s.alpha_bar[t] * x_t"),
    ],
    "tests/test_process.py::test_variance_between": [
        ("process", "from_beta, from_alpha) / s.alpha_bar[u] ** 2", "from_beta, from_alpha) / s.alpha_bar[u]"),
        ("process", "s.beta_bar[t] < s.alpha_bar[t], from_beta", "s.beta_bar[t] > s.alpha_bar[t], from_beta"),
    ],
    "tests/test_losses.py::test_weighted_step_loss_is_the_distance_to_x_prev": [
        ("losses", "(s.beta[t] / s.alpha[t]) ** 2", "(s.beta[t] / s.alpha[t])"),
    ],
    "tests/test_losses.py::test_step_loss_term_by_term": [
        ("losses", "(x_0, t - 1, eps_bar_prev)", "(x_0, t, eps_bar_prev)"),
        ("losses", "eps - _per_example(process.step_noise, s)(eps_bar_fn(x_t, t), t)", "eps - eps_bar_fn(x_t, t)"),
        ("losses", "tuple(range(1, x.ndim))", "tuple(range(2, x.ndim))"),
        ("losses", "jnp.mean(x**2,", "jnp.sum(x**2,"),
    ],
    "tests/test_losses.py::test_simple_loss_term_by_term": [
        ("losses", "eps_bar - eps_bar_fn(x_t, t)", "eps_bar + eps_bar_fn(x_t, t)"),
        ("losses", "eps_bar - eps_bar_fn(x_t, t)", "eps_bar - eps_bar_fn(x_t, t - 1)"),
    ],
    "tests/test_losses.py::test_noises_differ_by_example_and_number_and_not_by_batch": [
        ("losses", "jax.random.fold_in(key, k)", "jax.random.fold_in(key, 0)"),
    ],
    "tests/test_losses.py::test_losses_of_other_predictions_are_simple_loss_reweighted": [
        ("losses", "mean_square(x_0 - x_0_fn(", "mean_square(eps_bar - x_0_fn("),
        ("losses", "(process.velocity, s)(x_0, t, eps_bar)", "(process.velocity, s)(eps_bar, t, x_0)"),
    ],
    "tests/test_sampling.py::test_the_chain_is_a_loop_over_17": [
        ("sampling", "jax.random.fold_in(key, t)", "jax.random.fold_in(key, t - 1)"),
        ("sampling", "jnp.where(t > 1, sigma[t], 0.0)", "sigma[t]"),
        ("sampling", "jnp.where(t > 1, sigma[t], 0.0)", "jnp.where(t > 2, sigma[t], 0.0)"),
        ("sampling", "jnp.where(t > 1, sigma[t], 0.0)", "jnp.where(t > 1, sigma[t - 1], 0.0)"),
        ("sampling", "process.step_noise(s, eps_bar, t), noise)", "eps_bar, noise)"),
        ("sampling", "jnp.full(x.shape[:1], t)", "jnp.full(x.shape[:1], t - 1)"),
        ("sampling", "jnp.arange(start, stop, -1, dtype", "jnp.arange(start - 1, stop - 1, -1, dtype"),
    ],
    "tests/test_sampling.py::test_clip_bounds_the_predicted_x_0": [
        ("sampling", "process.posterior_mean(s, x_0, x, t) + noise", "process.posterior_mean(s, x_0, x, t)"),
    ],
    "tests/test_sampling.py::test_sample_fn_is_the_chain_from_its_latent": [
        ("sampling", "x = normal(keys, LATENT,", "x = normal(keys, 1,"),
    ],
    "tests/test_sampling.py::test_image_i_depends_on_the_key_and_i_alone": [
        ("sampling", '+ np.uint32(checked("first", first, 0, 2**32 - int(num)))', ""),
    ],
    "tests/test_sampling.py::test_image_keys_fold_in_the_index": [
        ("sampling", "jax.vmap(jax.random.fold_in, (None, 0))(rng, indices)", "jax.random.split(rng, len(indices))"),
    ],
    "tests/test_fast_sampling.py::test_ddim_is_a_loop_over_its_formula": [
        (
            "sampling",
            "share = s.beta_bar[u] / s.beta_bar[t]\n        deviation",
            "share = s.beta_bar[u]\n        deviation",
        ),
        ("sampling", "eta * share *", "eta**2 * share *"),
        ("sampling", "process.variance_between(s, t, u)", "process.variance_between(s, t, t - 1)"),
        ("sampling", "direction * eps_bar + deviation", "s.beta_bar[u] * eps_bar + deviation"),
        ("sampling", "deviation * normal(keys, t, x", "deviation * normal(keys, u, x"),
        ("sampling", "Prediction(process.predict_eps_bar(s, x, t, x_0)", "Prediction(found.eps_bar"),
    ],
    "tests/test_fast_sampling.py::test_ddim_caps_the_noise_at_the_whole_variance": [
        ("sampling", "deviation = jnp.minimum(deviation, s.beta_bar[u])", "deviation = jnp.minimum(deviation, 1.0)"),
    ],
    "tests/test_fast_sampling.py::test_dpmpp_2m_is_a_loop_over_its_formula": [
        ("sampling", "h = log_snr[u] - log_snr[t]", "h = log_snr[t] - log_snr[u]"),
        ("sampling", "(h_before > 0) & (u > 0)", "(h_before > 0)"),
        ("sampling", "0.5 * h / jnp", "h / jnp"),
        ("sampling", "weight * (x_0 - x_0_before)", "weight * (x_0_before - x_0)"),
        ("sampling", "(s.alpha_bar[u] - s.alpha_bar[t] * share) * blend", "(s.alpha_bar[u] - s.alpha_bar[t]) * blend"),
        ("sampling", "return (x, x_0, h), (x, x_0)", "return (x, blend, h), (x, x_0)"),
        ("sampling", "eta * jnp.clip(h, 0.0, 88.0)", "jnp.clip(h, 0.0, 88.0)"),
        ("sampling", "share *= jnp.exp(-forgotten)", "share *= jnp.exp(-2 * forgotten)"),
        ("sampling", "            share *= jnp.exp(-forgotten)\n", ""),
        ("sampling", "jnp.expm1(-2 * forgotten)", "jnp.expm1(-forgotten)"),
        ("sampling", "jnp.sqrt(-jnp.expm1(-2 * forgotten))", "-jnp.expm1(-2 * forgotten)"),
        ("sampling", "x += s.beta_bar[u] * jnp.sqrt", "x += s.beta_bar[t] * jnp.sqrt"),
    ],
    "tests/test_fast_sampling.py::test_dpmpp_2m_without_noise_draws_none": [
        ("sampling", "isinstance(eta, jax.core.Tracer) or bool(eta)", "True"),
        ("sampling", "isinstance(eta, jax.core.Tracer) or bool(eta)", "isinstance(eta, jax.core.Tracer) or eta >= 1"),
    ],
    "tests/test_fast_sampling.py::test_dpmpp_2m_noise_is_finite_at_every_step": [
        ("sampling", "jnp.clip(h, 0.0, 88.0)", "jnp.minimum(h, 88.0)"),
        ("sampling", "jnp.clip(h, 0.0, 88.0)", "jnp.maximum(h, 0.0)"),
        ("sampling", "jnp.clip(h, 0.0, 88.0)", "jnp.clip(h, 0.0, 1.0)"),
    ],
    "tests/test_fast_sampling.py::test_a_window_observes_every_kth_step_and_changes_no_bit": [
        ("sampling", "i % window.every == 0", "(i - 1) % window.every == 0"),
        ("sampling", "_report(window, u, states)", "_report(window, t, states)"),
        ("sampling", "        window.report(*args)", "        return window.report(*args)"),
        ("sampling", "window.look(*states)", "window.look(*states[::-1])"),
    ],
    "tests/test_fast_sampling.py::test_grids_that_do_not_fall_are_rejected": [
        ("sampling", "(np.diff(ts.astype(np.int64)) >= 0).any()", "(np.diff(ts.astype(np.int64)) > 0).any()"),
        ("sampling", 'checked("ts", ts, 0, s.num_steps,', 'checked("ts", ts, 0, s.num_steps + 1,'),
        ("sampling", 'checked("ts", ts, 0,', 'checked("ts", ts, -1,'),
    ],
    "tests/test_fast_sampling.py::test_grids_fall_from_t_to_0": [
        ("sampling", 'n = checked("n", n, 1, s.num_steps)', 'n = checked("n", n, 1, s.num_steps + 1)'),
    ],
    "tests/test_classes.py::test_guidance_sharpens_the_density_of_the_class": [
        (
            "sampling",
            "of_all + w * (of_y - of_all)",
            "w * (of_y - of_all)",
        ),
        ("sampling", "of_all + w * (of_y - of_all)", "of_all + (1 + w) * (of_y - of_all)"),
    ],
    "tests/test_classes.py::test_guidance_in_an_interval_of_steps": [
        ("sampling", "(t >= low) & (t <= high)", "(t > low) & (t <= high)"),
        ("sampling", "(t >= low) & (t <= high)", "(t >= low) & (t < high)"),
        ("sampling", "jnp.asarray(weight, jnp.float32), 1.0)", "jnp.asarray(weight, jnp.float32), 0.0)"),
    ],
    "tests/test_classes.py::test_labels_of_images": [
        ("sampling", "(numbers % num_classes)", "(numbers // num_classes)"),
        ("sampling", 'checked("labels", labels, 0, num_classes,', 'checked("labels", labels, 0, num_classes - 1,'),
    ],
    "tests/test_likelihood.py::test_decoder_is_the_mass_of_a_bin": [
        ("likelihood", "(x_0 - mean + offset)", "(x_0 - mean - 2 * offset)"),
        ("likelihood", "_HALF_BIN = 1 / 255", "_HALF_BIN = 1 / 256"),
        ("likelihood", "jnp.exp(-log_std)", "jnp.exp(log_std)"),
        ("likelihood", "jnp.where(flip, -upper, lower)", "jnp.where(flip, upper, lower)"),
        ("likelihood", "flip = lower + upper > 0", "flip = lower + upper > 1e9"),
        ("likelihood", "jnp.where(darkest, log_ndtr(upper)", "jnp.where(brightest, log_ndtr(upper)"),
    ],
    "tests/test_likelihood.py::test_decoder_by_tanh": [
        ("likelihood", "0.044715 * x**3", "0.044715 * x**2"),
        ("likelihood", "jnp.where(darkest, above,", "jnp.where(darkest, 1 - above,"),
    ],
    "tests/test_likelihood.py::test_prior_kl": [
        ("likelihood", "jnp.log1p(-square)", "jnp.log1p(square)"),
        ("likelihood", "square * (x_0**2 - 1)", "square * x_0**2"),
    ],
    "tests/test_likelihood.py::test_terms_are_the_divergences_of_two_normals": [
        (
            "likelihood",
            "s.beta[t] * s.beta_bar[t - 1] / s.beta_bar[t]",
            "s.beta[t] * s.beta_bar[t] / s.beta_bar[t - 1]",
        ),
        (
            "likelihood",
            "s.alpha_bar[t - 1] * (s.beta[t] / s.beta_bar[t]) ** 2",
            "s.alpha_bar[t] * (s.beta[t] / s.beta_bar[t]) ** 2",
        ),
        ("likelihood", "(jnp.expm1(log_ratio) - log_ratio) + 0.5", "(jnp.exp(log_ratio) - log_ratio) + 0.5"),
        ("likelihood", "0.5 * (shift / deviation) ** 2", "(shift / deviation) ** 2"),
        ("likelihood", "0.5 * (shift / deviation) ** 2", "0.5 * shift**2 / deviation"),
        ("likelihood", "sigma_posterior(s)[2]", "sigma_posterior(s)[3]"),
        ("likelihood", "jnp.mean(nats) / math.log(2)", "jnp.mean(nats)"),
        ("likelihood", "jnp.where(t == 1, decoder", "jnp.where(t <= 2, decoder"),
    ],
    "tests/test_likelihood.py::test_squared_error_and_loss_of_each_step": [
        ("likelihood", "(eps_bar - found.eps_bar) ** 2", "(eps_bar + found.eps_bar) ** 2"),
        ("likelihood", "jax.random.fold_in(key, t)", "jax.random.fold_in(key, t - 1)"),
    ],
    "tests/test_likelihood.py::test_the_bound_is_the_sum_of_its_parts": [
        ("likelihood", "rate = prior + terms[1:].sum()", "rate = prior + terms.sum()"),
        ("likelihood", "127.5 * squared_error**0.5", "255 * squared_error**0.5"),
    ],
    "tests/test_likelihood.py::test_rate_and_distortion_of_progressive_coding": [
        ("evaluation/bound", "[::-1])[::-1] - terms", "[::-1])[::-1]"),
    ],
    "tests/test_likelihood.py::test_vlb_loss_is_num_steps_times_the_term": [
        ("losses", "s.num_steps * likelihood", "likelihood"),
    ],
    "tests/test_likelihood.py::test_importance_is_the_share_of_each_term_on_gaussian_data": [
        ("losses", "error = deviation**2 * beta_bar**2 /", "error = deviation**2 * beta_bar /"),
        ("losses", "p[1] = 0.5 * error[1] / std**2", "p[1] = error[1] / std**2"),
        (
            "losses",
            "alpha_bar[1:-1] * (beta[2:] / beta_bar[2:]) ** 2",
            "alpha_bar[2:] * (beta[2:] / beta_bar[2:]) ** 2",
        ),
    ],
    "tests/test_schedule.py::test_sigmoid": [
        ("schedule", "(f[-1] - f) / (f[-1] - f[0])", "(f[-1] - f) / f[-1]"),
        ("schedule", ", 1e-9)", ", 1e-8)"),
        ("schedule", "num_steps + 1) / tau)", "num_steps + 1) * tau)"),
    ],
    "tests/test_schedule.py::test_snr": [
        ("schedule", "jnp.square(s.alpha_bar / s.beta_bar)", "s.alpha_bar / s.beta_bar"),
    ],
    "tests/test_schedule.py::test_zero_terminal": [
        ("schedule", "(first * (alpha_bar[1:] - last)", "((alpha_bar[1:] - last)"),
        ("schedule", "np.sqrt(_alpha_bar_squared(s))", "_alpha_bar_squared(s)"),
        ("schedule", "alpha_bar_squared[1:] / alpha_bar_squared[:-1]", "alpha_bar_squared[1:]"),
    ],
    "tests/test_schedule.py::test_shifted": [
        ("schedule", "np.exp(log_snr_shift) * square", "np.exp(2 * log_snr_shift) * square"),
        ("schedule", "(scaled + 1 - square)", "(scaled + 1)"),
    ],
    "tests/test_schedule.py::test_sigma_analytic_is_the_true_deviation_of_gaussian_data": [
        ("schedule", "s.alpha_bar[:-1] * s.beta[1:] ** 2", "s.alpha_bar[1:] * s.beta[1:] ** 2"),
        ("schedule", "+ coefficient**2 * x_0_variance", "+ coefficient * x_0_variance"),
        ("schedule", "s.beta[1:] ** 2 / s.beta_bar[1:] ** 2)", "s.beta[1:] ** 2 / s.beta_bar[1:])"),
        ("schedule", "jnp.maximum(1 - jnp.asarray(mean_square, jnp.float32), 0)", "1 - jnp.asarray(mean_square)"),
    ],
    "tests/test_process.py::test_interpolated_sigma_lies_between_the_two_fixed_ones": [
        ("process", "(v + 1) / 2", "v + 1"),
        ("process", "[jnp.maximum(t, 2)]", "[jnp.maximum(t, 1)]"),
        ("process", "nu * jnp.log(s.beta[t]) + (1 - nu)", "(1 - nu) * jnp.log(s.beta[t]) + nu"),
    ],
    "tests/test_process.py::test_x_0_of_the_velocity": [
        ("process", "s.alpha_bar[t] * x_t - s.beta_bar[t] * v", "s.alpha_bar[t] * x_t + s.beta_bar[t] * v"),
    ],
    "tests/test_losses.py::test_min_snr_weight_by_its_definition": [
        ("losses", "gamma / schedule.snr(s)", "schedule.snr(s) / gamma"),
        ("losses", '"x_0": schedule.snr(s)', '"x_0": schedule.snr(s) + 1'),
        ("losses", '"velocity": s.alpha_bar**2', '"velocity": s.alpha_bar'),
    ],
    "tests/test_losses.py::test_p2_weight_by_its_definition": [
        ("losses", "** -gamma", "** gamma"),
        ("losses", "(k + schedule.snr(s))", "(1 + schedule.snr(s))"),
    ],
    "tests/test_likelihood.py::test_hybrid_loss_is_the_sum_and_its_bound_moves_the_deviations_alone": [
        ("losses", "eps_bar=jax.lax.stop_gradient(found.eps_bar)", "eps_bar=found.eps_bar"),
        ("losses", "+ share * bound", "+ bound"),
    ],
    "tests/test_likelihood.py::test_terms_with_learned_deviations_are_those_with_an_array": [
        ("likelihood", "else (found.sigma, found.sigma)", "else (decoder_std, found.sigma)"),
        ("likelihood", "else (found.sigma, found.sigma)", "else (found.sigma, sigma[kl_step])"),
    ],
    "tests/test_likelihood.py::test_a_prediction_of_x_0_is_taken_as_it_is": [
        ("likelihood", "process.x_0_of(s, x_t, t, found)", "process.predict_x_0(s, x_t, t, found.eps_bar)"),
    ],
    "tests/test_likelihood.py::test_mean_square_of_the_predicted_noise": [
        ("likelihood", "found.eps_bar**2", "eps_bar**2"),
    ],
    "tests/test_sampling.py::test_the_networks_own_deviation_and_x_0_replace_those_of_the_chain": [
        ("sampling", "jnp.where(t > 1, own, 0.0)", "jnp.where(t > 1, sigma[t], 0.0)"),
    ],
    "tests/test_sampling.py::test_the_chain_from_pure_noise_at_a_zero_terminal": [
        ("process", "if found.x_0 is None else found.x_0", "if True else found.x_0"),
        ("sampling", "found._replace(x_0=x_0), found.x_0 is None", "found._replace(x_0=x_0), True"),
    ],
    "tests/test_sampling.py::test_guidance_of_predictions": [
        ("sampling", "both._replace(sigma=conditional.sigma)", "both"),
    ],
    "tests/test_fast_sampling.py::test_analytic_ddim_keeps_every_variance_of_the_grid": [
        ("sampling", "direction * s.alpha_bar[t] / s.beta_bar[t]) ** 2", "direction * s.alpha_bar[t] / s.beta_bar[t])"),
        ("sampling", "direction * s.alpha_bar[t] / s.beta_bar[t])", "direction * s.alpha_bar[u] / s.beta_bar[t])"),
        ("sampling", "jnp.where(u > 0, jnp.sqrt(deviation**2 + of_x_0), 0.0)", "jnp.sqrt(deviation**2 + of_x_0)"),
    ],
    "tests/test_fast_sampling.py::test_grid_by_bound_is_the_best_of_all_grids": [
        ("sampling", "0.5 * (ratio[u] - ratio[t])", "(ratio[u] - ratio[t])"),
        ("sampling", "* error[t + 1]", "* error[t]"),
        ("sampling", "np.log(127.5)", "np.log(12.75)"),
        ("sampling", "np.pi * np.e * error[1:]", "np.pi * np.e * error[1:] ** 2"),
    ],
    "tests/pictures/test_figures.py::test_interpolation_is_a_chain_from_the_mixed_latents": [
        ("pictures/figures", "(1 - weight) * x_t + weight * y_t", "weight * x_t + (1 - weight) * y_t"),
        ("pictures/figures", "process.forward(s, image, t, eps_bar)", "process.forward(s, image, t - 1, eps_bar)"),
    ],
    "tests/pictures/test_figures.py::test_progressive_predicts_x_0_from_the_chain_cut_at_each_step": [
        (
            "pictures/figures",
            "jnp.where(steps == t, x_0[None], predictions)",
            "jnp.where(steps == t, x[None], predictions)",
        ),
        (
            "pictures/figures",
            "jnp.where(steps == t, x_0[None], predictions)",
            "jnp.where(steps == t - 1, x_0[None], predictions)",
        ),
        ("pictures/figures", "jnp.where(steps == 0, x[None], predictions)", "predictions"),
    ],
    "tests/pictures/test_edits.py::test_one_repeat_is_inpainting_bit_for_bit": [
        ("pictures/edits", "sampling.normal(own, num_steps + t,", "sampling.normal(own, t,"),
        (
            "pictures/edits",
            "process.forward(s, x_0, t, sampling.normal(own",
            "process.forward(s, x_0, t - 1, sampling.normal(own",
        ),
        ("pictures/edits", "jnp.where(known, process.forward", "jnp.where(~known, process.forward"),
        ("pictures/edits", "return jnp.where(known, x_0, x)", "return x"),
    ],
    "tests/pictures/test_edits.py::test_times_of_a_small_case_by_hand": [
        ("pictures/edits", "1 <= t <= num_steps - jump", "1 <= t < num_steps - jump"),
        ("pictures/edits", "1 <= t <= num_steps - jump", "0 <= t <= num_steps - jump"),
        ("pictures/edits", "(t - 1) % jump == 0", "t % jump == 0"),
        ("pictures/edits", "* (repeats - 1)", "* repeats"),
    ],
    "tests/pictures/test_edits.py::test_repaint_is_a_loop_over_its_moves": [
        ("pictures/edits", "jnp.sqrt(process.variance_between(s, t, u))", "process.variance_between(s, t, u)"),
        ("pictures/edits", "s.alpha_bar[t] / s.alpha_bar[u] * x", "s.alpha_bar[t] * x"),
        ("pictures/edits", "2 * num_steps + r)", "2 * num_steps)"),
        ("pictures/edits", "sampling.normal(own, 2 * num_steps + t,", "sampling.normal(own, num_steps + t,"),
        ("pictures/edits", "visits.append(counts[t])", "visits.append(len(visits))"),
    ],
    "tests/pictures/test_edits.py::test_boundary_error_is_the_mean_jump_across_the_edge": [
        ("pictures/edits", "axis=axis)), axis=(1, 2, 3))", "axis=axis)), axis=(1, 2, 3)) / 2"),
        ("pictures/edits", "* images.shape[3]", ""),
    ],
    "tests/pictures/test_edits.py::test_sdedit_is_a_chain_from_the_noised_image": [
        ("pictures/edits", "sampling.LATENT", "t"),
    ],
    "tests/pictures/test_edits.py::test_inversion_is_a_loop_over_its_formula": [
        ("pictures/edits", "jnp.maximum(u, 1)", "jnp.maximum(u, 2)"),
        (
            "pictures/edits",
            "process.predict_x_0(s, x, u, eps_bar), t, eps_bar)",
            "process.predict_x_0(s, x, t, eps_bar), t, eps_bar)",
        ),
        ("pictures/edits", "(grid[:-1], grid[1:])", "(grid[1:], grid[1:])"),
    ],
    "tests/data/test_order.py::test_all_orders_are_equally_frequent": [
        ("data/order", "_mix(epoch ^ _mix(_word(seed, i)))", "_mix(_mix(_word(seed, i)))"),
        ("data/order", "_mix(epoch ^ _mix(_word(seed, i)))", "_mix(epoch + _word(seed, 0))"),
        ("data/order", "seed + i * 0x9E3779B9", "i * 0x9E3779B9"),
        ("data/order", "_mix(right ^ key) & mask", "_mix(key) & mask"),
    ],
    "tests/data/test_order.py::test_each_epoch_is_a_permutation": [
        ("data/order", "where(x < num, x, permuted(x))", "where(x < num, x, permuted(x) % num)"),
    ],
    "tests/running/test_averages.py::test_the_exponent_gives_a_profile_of_the_relative_length": [
        ("running/averages", "sigma_rel**-2.0", "sigma_rel**-1.0"),
        ("running/averages", "[1, 7, 16 - t, 12 - t]", "[1, 7, 16 - t, 12]"),
        ("running/averages", "np.max(np.roots", "np.min(np.roots"),
    ],
    "tests/running/test_averages.py::test_the_exponents_of_the_paper": [
        ("running/averages", "(0.05, 0.10)", "(0.05, 0.11)"),
    ],
    "tests/running/test_averages.py::test_the_inner_product_is_the_integral": [
        ("running/averages", "gamma_b, -gamma_a)", "gamma_a, -gamma_b)"),
        ("running/averages", "np.maximum(t_a, t_b)", "np.minimum(t_a, t_b)"),
        ("running/averages", "(gamma_a + gamma_b + 1)", "(gamma_a + gamma_b + 2)"),
        ("running/averages", "(gamma_a + 1) * (gamma_b + 1)", "(gamma_a + 1) * gamma_b"),
    ],
    "tests/running/test_averages.py::test_the_rate_keeps_its_digits_in_float32": [
        ("running/averages", "-jnp.expm1((gamma + 1) * jnp.log1p(-1 / n))", "1 - (1 - 1 / n) ** (gamma + 1)"),
        ("running/averages", "jnp.log1p(-1 / n)", "jnp.log1p(-1 / (n + 1))"),
    ],
    "tests/running/test_averages.py::test_an_average_weights_each_step_by_the_integral_of_its_profile": [
        ("running/averages", "-jnp.expm1((gamma + 1)", "-jnp.expm1(gamma"),
        ("running/averages", "share * (new - old)", "share * new"),
    ],
    "tests/running/test_averages.py::test_the_fit_is_the_nearest_whose_weights_sum_to_1": [
        ("running/averages", "gram[n, :n] = gram[:n, n] = 1", "gram[n, n] = 1"),
        ("running/averages", "np.append(cross, 1.0)", "np.append(cross, 0.0)"),
        ("running/averages", "- 2 * weights @ cross", "- weights @ cross"),
        ("running/averages", "/ norm))", "))"),
        (
            "running/averages",
            "inner_product(t, gamma, t_wanted, gamma_wanted)",
            "inner_product(t, gamma, t_wanted, gamma)",
        ),
    ],
    "tests/test_step.py::test_power_function_averages_move_by_their_rate": [
        ("step", "params, state.step + 1, power_exponents", "params, state.step, power_exponents"),
        ("step", "averages.updated(state.averages, params", "averages.updated(state.averages, state.params"),
    ],
    "tests/running/test_snapshots.py::test_post_hoc_averages_are_the_weighted_sums_of_the_files": [
        ("running/snapshots", "weights.reshape(-1, len(last))", "weights.reshape(len(last), -1).T"),
        ("running/snapshots", "step, averages.exponent(ema))", "step + 1, averages.exponent(ema))"),
        ("running/snapshots", "np.tile(averages.EXPONENTS", "np.tile(averages.EXPONENTS[::-1]"),
        ("running/snapshots", "run, newest) if number < step else newest", "run, newest) if number > 2 else newest"),
        ("running/snapshots", "in steps(folder) if number < step]", "in steps(folder)]"),
    ],
    "tests/running/test_snapshots.py::test_a_resumed_run_has_the_same_averages_and_files": [
        ("running/snapshots", "(number for number in steps(folder) if number > step)", "()"),
    ],
    "tests/running/test_snapshots.py::test_a_snapshot_that_a_kill_cut_off_is_made_at_the_next_start": [
        ("running/snapshots", "if due.is_due(step, [every]):", "if False:"),
    ],
    "tests/running/test_snapshots.py::test_averages_start_with_the_run_or_not_at_all": [
        ("running/snapshots", "    if int(state.step):", "    if False:"),
    ],
}


def stages(first) -> list[tuple[str, list[str]]]:
    """Returns (marker, tests) that a mutant meets in turn: the test that should catch it, then those of all files."""
    every_file = list(dict.fromkeys(name.split("::")[0] for name in MUTANTS))
    return [("", [first]), ("not slow", every_file), ("slow", every_file)]


class Planted(importlib.machinery.SourceFileLoader):
    """Finds and loads one module of the package, with one piece of its text replaced.

    Processes that a test starts import the module without the mistake.
    """

    def __init__(self, module, before, after):
        super().__init__(f"diffusion_jax.{module.replace('/', '.')}", str(ROOT / "diffusion_jax" / f"{module}.py"))
        self.before, self.after, self.is_imported = before, after, False

    def find_spec(self, fullname, path=None, target=None):
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def get_code(self, fullname):
        self.is_imported = True
        return compile(self.get_source(fullname).replace(self.before, self.after), self.path, "exec")


def run(tests_in_turn, mutant) -> int | None:
    """Returns the first index of `tests_in_turn` [(marker, tests)] that catches a mutant, or None.

    Has its own process.
    """
    gc.freeze()  # pytest collects garbage five times at its end, each time through all of the imported libraries
    os.chdir(ROOT)
    planted = Planted(*mutant)
    sys.meta_path.insert(0, planted)
    caught_by = next((i for i, of in enumerate(tests_in_turn) if not passes(*of, mutant)), None)
    if not planted.is_imported:
        raise RuntimeError(f"no test imports {mutant}")
    return caught_by


def passes(marker, tests, mutant) -> bool:
    """Runs tests of the project in this process."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        code = pytest.main([*QUIETLY, "-m", marker, *tests])
    if code not in (0, 1, 2, 4, 5):  # 1: a test failed; 2, 4: the mutant cannot be imported; 5: none has this marker
        raise RuntimeError(f"pytest ended with {code} for {mutant}: the machine, not the mutant, stopped it")
    return code in (0, 5)


def main():
    mutants = [(first, mutant) for first, own in MUTANTS.items() for mutant in own]
    harmless = ("schedule", "import numpy as np", "import numpy as np")
    for _, (module, before, _) in mutants:
        count = (ROOT / "diffusion_jax" / f"{module}.py").read_text().count(before)
        if count != 1:
            sys.exit(f"{module}.py holds {before!r} {count} times, not once: mend MUTANTS")
    survivors = 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)  # compiled programs, for all
        pool = concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context, max_tasks_per_child=1)
        unharmed = pool.submit(run, [("", list(MUTANTS))], harmless)
        results = [pool.submit(run, stages(first), mutant) for first, mutant in mutants]
        if unharmed.result() is not None:
            pool.shutdown(cancel_futures=True)
            sys.exit("the tests fail without any mistake")
        for (first, mutant), result in zip(mutants, results, strict=True):
            survivors += result.result() is None
            verdict = {None: "SURVIVED", 0: f"caught by {first}"}.get(result.result(), "caught by another test")
            print(*mutant, verdict, sep=" | ", flush=True)
        later = {result.result() for result in results} - {0, None}
        if later and pool.submit(run, [stages("")[i] for i in later], harmless).result() is not None:
            sys.exit("the tests of all files fail without any mistake")
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants caught")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
