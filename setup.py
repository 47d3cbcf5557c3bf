"Package metadata: settings.ini, with the version that nbdev keeps in sae_lab/__init__.py."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(root / "settings.ini", encoding="utf-8")
facts = config["DEFAULT"]
name = facts["lib_name"]
version = re.search(r'__version__ = "([^"]+)"', (root / facts["lib_path"] / "__init__.py").read_text())[1]
readme = root / "README.md"
extras = {k.removesuffix("_requirements"): v.split() for k, v in facts.items() if k.endswith("_requirements")}
carried = {f"{name}.nbs": "nbs", f"{name}.tests": "tests"}  # notebooks and tests travel in the wheel
folders = {f"{p}.{s}": f"{d}/{s.replace('.', '/')}" for p, d in carried.items() for s in find_packages(d)}

setup(
    name=name, version=version, description=facts["description"], keywords=facts["keywords"].split(),
    author=facts["author"], author_email=facts["author_email"], url=facts["git_url"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else facts["description"],
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=[name, f"{name}.*"]), *carried, *folders],
    package_dir={**carried, **folders},
    package_data={name: ["static/*", "data/**/*"],
                  f"{name}.nbs": ["**/*.ipynb"], f"{name}.tests": ["**/*.py", "**/*.js"]},
    zip_safe=False, python_requires=">=" + facts["min_python"],
    install_requires=facts["requirements"].split(), extras_require=extras,
    classifiers=["Programming Language :: Python :: 3", "Intended Audience :: Science/Research",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    entry_points={"console_scripts": [f"sae-lab = {name}.cli:main"], "nbdev": [f"{name} = {name}._modidx:d"]},
    project_urls={"Source": facts["git_url"]},
)
