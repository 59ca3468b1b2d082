"""Installs `proteingpt`. Exact versions live in constraints.txt; the reason for each dependency in the README."""

from setuptools import find_packages, setup

setup(
    name="proteingpt",
    version="0.1.0",
    description="ProteinGPT (arXiv 2408.11363) as a DeepSpeed trainer: frozen ESM-2 and ESM-IF1, one projection each, any causal LM",
    python_requires=">=3.11",
    packages=find_packages(include=["proteingpt", "proteingpt.*"]),
    package_data={"proteingpt": ["recipes/*.yaml", "data/*.txt", "evaluation/*.txt", "evaluation/*.css", "inference/static/*"]},
    install_requires=[
        "torch>=2.13",
        "deepspeed>=0.19.6",
        "fair-esm>=2.0",
        "transformers>=5.0",
        "webdataset>=1.0",
        "mpi4py>=4.0",
        "biotite>=1.6",
        "tensorboard>=2.20",
        "numpy>=2.0",
        "safetensors",
        "tokenizers",
        "sentencepiece",
        "pyyaml",
        "fsspec",
        "peft>=0.21",
        "accelerate>=1.15",
    ],
    extras_require={
        "8bit": ["bitsandbytes>=0.50"],
        "evaluation": ["bert-score>=0.3.13", "rouge-score>=0.1.2", "sacrebleu>=2.6", "nltk>=3.10"],
        "mlflow": ["mlflow-skinny>=3"],
        "wandb": ["wandb>=0.20"],
        "test": [
            "pytest", "pytest-xdist", "hypothesis", "gemmi", "mpich", "scikit-learn",
            "proteingpt[8bit,evaluation,mlflow,wandb]",
        ],
    },
)
