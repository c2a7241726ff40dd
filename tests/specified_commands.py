"""What the specification that the program was written to says: every command's flags, defaults."""

TRAINING = """
--dataset_type flickr8k --decoder lstm --epochs 15 --batch_size 64 --learning_rate 0.001
--use_scheduler --scheduler_type cosine --scheduler_t_max 15 --min_lr 1e-6

--dataset_type flickr30k --decoder attention --epochs 30 --batch_size 128 --learning_rate 0.0001
--use_scheduler --scheduler_type cosine --scheduler_t_max 20 --min_lr 1e-6 --save_attention_viz
--attention_viz_samples 5 --advanced_attention_viz

--dataset_type flickr8k --decoder attention --epochs 12 --batch_size 128 --learning_rate 0.001
--use_scheduler --scheduler_type reduce_lr_on_plateau --scheduler_patience 3
--scheduler_factor 0.5 --save_attention_viz --attention_viz_samples 3

--dataset_type flickr8k --decoder lstm --epochs 10 --batch_size 64

--dataset_type flickr30k --decoder attention --epochs 15 --batch_size 32

--dataset_type flickr30k --decoder attention --epochs 20 --batch_size 32 --learning_rate 0.0005
--use_scheduler --scheduler_type cosine --scheduler_t_max 20 --min_lr 1e-6

--dataset_type flickr30k --decoder attention --epochs 15 --batch_size 32 --save_attention_viz
--attention_viz_samples 3

--dataset_type flickr30k --decoder attention --epochs 20 --batch_size 32 --learning_rate 0.0005
--use_scheduler --scheduler_type cosine --scheduler_t_max 20 --min_lr 1e-6 --save_attention_viz
--attention_viz_samples 5 --advanced_attention_viz

--dataset_type flickr8k --decoder attention --epochs 15 --batch_size 64 --learning_rate 0.001
--use_scheduler --scheduler_type reduce_lr_on_plateau --scheduler_patience 3
--scheduler_factor 0.5 --save_attention_viz

--dataset_type flickr30k --decoder lstm --epochs 20 --batch_size 32 --learning_rate 0.001
--use_scheduler --scheduler_type step --scheduler_step_size 5 --scheduler_gamma 0.3

--dataset_type flickr8k --decoder lstm --epochs 15 --batch_size 128 --learning_rate 0.001
--use_scheduler --scheduler_type cosine --scheduler_t_max 15

--dataset_type flickr30k --decoder attention --epochs 20 --batch_size 64 --learning_rate 0.0005
--use_scheduler --scheduler_type cosine --scheduler_t_max 20 --save_attention_viz
--attention_viz_samples 5

--dataset_type flickr8k --decoder lstm --epochs 15 --batch_size 64 --learning_rate 0.001
--use_scheduler --scheduler_type cosine --scheduler_t_max 15

--dataset_type flickr30k --decoder attention --epochs 30 --batch_size 128 --learning_rate 0.0001
--use_scheduler --scheduler_type reduce_lr_on_plateau --scheduler_patience 5
--scheduler_factor 0.5

--dataset_type flickr8k --decoder lstm --epochs 10
"""
RESUME_AND_TEST = """
--model_path saved_models/flickr30k/resnet_attention/model_epoch_10.pt --epochs 5
--use_scheduler --scheduler_type cosine

--model_path saved_models/flickr30k/resnet_attention/model_epoch_15.pt --epochs 5
--save_attention_viz --attention_viz_samples 3

--mode test --model_path saved_models/flickr30k/resnet_attention/best.pt
--dataset_type flickr30k
"""
TRAINING_COMMANDS, RESUME_AND_TEST_COMMANDS = (
    [" ".join(command.split()) for command in commands.split("\n\n")]
    for commands in (TRAINING, RESUME_AND_TEST)
)
DEFAULTS = {
    "dataset_type": "flickr30k", "decoder": "lstm", "epochs": 10, "batch_size": 128,
    "learning_rate": 0.0001, "use_scheduler": False, "scheduler_type": "reduce_lr_on_plateau",
    "scheduler_patience": 3, "scheduler_factor": 0.5, "scheduler_step_size": 7,
    "scheduler_gamma": 0.1, "scheduler_t_max": 10, "min_lr": 1e-7, "warmup_epochs": 0,
    "attention_viz_samples": 3, "embed_size": 512, "hidden_size": 1024, "num_layers": 3,
    "attention_dim": 512, "drop_prob": 0.3, "num_workers": 16,
}  # fmt: skip
