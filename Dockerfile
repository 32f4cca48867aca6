# Builds with docker, podman and buildah alike (no BuildKit syntax):
#
#   docker build -t localmodel-agent:dev .
#
# BASE is any image with Python 3.11 or newer and its venv module.
ARG BASE=python:3.12-slim

# What changes seldom, so that a new version of the agent is a small layer on a large one.
FROM ${BASE} AS dependencies
# All that the lock names comes down, each file checked by its hash. The lock holds the development
# tools too: what of it is installed, pip finds from our own requirements, with nothing but these
# files to choose from. So there is one lock, and the image cannot drift from it.
COPY requirements.lock /src/
RUN python3 -m venv /tools \
 && /tools/bin/pip download --quiet --disable-pip-version-check --no-cache-dir \
      --require-hashes --only-binary :all: --dest /wheels -r /src/requirements.lock
COPY pyproject.toml /src/
# sqlite-utils brings a pip of its own, which goes again.
RUN python3 -m venv --without-pip /opt/localmodel \
 && python3 -c 'import tomllib; project = tomllib.load(open("/src/pyproject.toml", "rb"))["project"]; \
print(*project["dependencies"], sep="\n")' >/src/requirements.txt \
 && PIP="/tools/bin/pip --quiet --disable-pip-version-check --python /opt/localmodel/bin/python" \
 && $PIP install --no-index --find-links /wheels -r /src/requirements.txt \
 && $PIP uninstall --yes pip

FROM dependencies AS agent
COPY README.md LICENSE /src/
COPY agent /src/agent
RUN /tools/bin/pip --quiet --disable-pip-version-check --python /opt/localmodel/bin/python \
      install --no-index --find-links /wheels --no-deps --prefix /agent /src

FROM ${BASE}
# Nothing is ever installed in a running container: the base's pip goes too, if it has one.
RUN python3 -B -c 'import importlib.util as u, shutil; pip = u.find_spec("pip"); \
pip and shutil.rmtree(pip.submodule_search_locations[0])' \
 && rm -f /usr/local/bin/pip*
COPY --from=dependencies /opt/localmodel /opt/localmodel
COPY --from=agent /agent /opt/localmodel
# The root file system may be read-only: Python writes no byte code, and the agent only to its mounts.
ENV PATH=/opt/localmodel/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# By number, because kubelet can prove `runAsNonRoot` only of a number.
USER 64000:64000
EXPOSE 9810
ENTRYPOINT ["localmodel"]
CMD ["agent"]
LABEL org.opencontainers.image.title="localmodel-agent" \
      org.opencontainers.image.description="A per-node model cache: downloads once, proves every byte, publishes with one rename." \
      org.opencontainers.image.licenses="Apache-2.0"
