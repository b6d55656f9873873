"""Which settings cannot change a run's figures. Nothing here imports torch."""

# What is set but cannot change the figures: two runs that differ in nothing else are equal.
WITHOUT_EFFECT = (
    *("experiment", "run_name", "tracking_uri", "log_pictures", "log_model", "log_system_metrics"),
    *("trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
    *("trainer.logger", "trainer.log_every_n_steps", "trainer.profiler"),
    *("trainer.enable_autolog_hparams", "trainer.model_registry", "trainer.detect_anomaly"),
    *("checkpoint.save_last", "checkpoint.every_n_train_steps", "non_finite_loss"),
    "model.cuda_graphs",
    "data.root",  # the pictures themselves are hashed
)
