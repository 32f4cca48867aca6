#!/usr/bin/env bash
# build.sh [VERSION]: etcd and the Kubernetes binaries that tests/cluster and tests/node run, from the
# Go module proxy, into a cache directory outside the checkout. Prints that directory last, on stdout.
#
# go.mod here is for the default version. Kubernetes' own go.mod points its staging modules at ./staging,
# which a published module does not hold, so they are replaced by their published versions; another
# version gets its go.mod made the same way, in the cache.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
default=$(awk '$1 == "k8s.io/kubernetes" {print $2}' "$here/go.mod")
version=${1:-$default}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/localmodel-agent/control-plane/$version
say() { printf 'control plane %s: %s\n' "$version" "$*" >&2; }

command -v go >/dev/null || { say "error: go is missing; it builds the Kubernetes binaries of the tests" >&2; exit 2; }
mkdir -p "$cache/module" "$cache/bin"
# Two test runs at once would write the same files: the second waits for the first.
exec 9>"$cache/lock"
flock 9
cd "$cache/module"
if [ "$version" = "$default" ]; then
  for file in go.mod go.sum tools.go; do
    cmp -s "$here/$file" "$file" || cp "$here/$file" . # a new time would build everything again
  done
elif [ ! -s go.sum ]; then
  say "resolving modules"
  cp "$here/tools.go" .
  printf 'module localmodel-agent/tests/controlplane\n\ngo 1.26.0\n\nrequire k8s.io/kubernetes %s\n\n' "$version" >go.mod
  published=$(go mod download -json "k8s.io/kubernetes@$version" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p')
  sed -n 's/^\(replace\)\{0,1\}[[:space:]]*\(.*\) => \.\/staging.*/\2/p' "$published" |
    awk -v v="v0.${version#v1.}" '{print "replace " $1 " => " $1 " " v}' >>go.mod
  go mod tidy >&2
fi

minor=$(echo "$version" | cut -d. -f2)
v=k8s.io/component-base/version
flags="-s -w -X $v.gitVersion=$version -X $v.gitMajor=1 -X $v.gitMinor=$minor"
build() { # NAME PACKAGE
  [ "$cache/bin/$1" -nt go.sum ] && return 0
  local start=$SECONDS
  say "building $1 ($((++number)) of 6)"
  CGO_ENABLED=0 go build -mod=mod -trimpath -ldflags "$flags" -o "$cache/bin/$1.new" "$2"
  mv "$cache/bin/$1.new" "$cache/bin/$1" # a build that was cut off leaves no half binary behind
  say "built $1 in $((SECONDS - start)) s"
}
number=0
[ -x "$cache/bin/kubelet" ] || say "first build: about 11 minutes on two cores, then cached in $cache"
build etcd go.etcd.io/etcd/server/v3
build kube-apiserver k8s.io/kubernetes/cmd/kube-apiserver
build kubectl k8s.io/kubernetes/cmd/kubectl
build kube-controller-manager k8s.io/kubernetes/cmd/kube-controller-manager
build kube-scheduler k8s.io/kubernetes/cmd/kube-scheduler
build kubelet k8s.io/kubernetes/cmd/kubelet
echo "$cache/bin"
