#!/usr/bin/env bash
# Writes test/kubernetes/MINOR/go.mod, the module that builds an older Kubernetes: hack/kubernetes-module.sh 1.34.4.
# The dependencies are those of the release.
set -euo pipefail
cd "$(dirname "$0")/../test/kubernetes"
version=v${1#v}
minor=${version#v}
minor=${minor%.*}
base=$(awk '$1 == "module" { print $2; exit }' go.mod)
src=$(go mod download -json "k8s.io/kubernetes@$version" | sed -n 's/^\t"Dir": "\(.*\)",/\1/p')
mkdir -p "$minor"
cd "$minor"
{
	printf 'module %s/%s\n\n' "$base" "$minor"
	sed -n '/^go /p' "$src/go.mod"
	echo
	sed -n '/^godebug/,/^)\|^godebug [^(]/p' "$src/go.mod"
	printf '\nrequire k8s.io/kubernetes %s\n\ntool (\n' "$version"
	for program in kube-apiserver kube-controller-manager kube-proxy kube-scheduler kubeadm kubectl kubelet; do
		printf '\tk8s.io/kubernetes/cmd/%s\n' $program
	done
	printf ')\n\nreplace (\n'
	sed -n 's#^\t\(k8s.io/[a-z-]*\) => ./staging/src/.*#\1#p' "$src/go.mod" | while read -r module; do
		printf '\t%s => %s v0.%s\n' "$module" "$module" "${version#v1.}"
	done
	echo ')'
} > go.mod
rm -f go.sum
go mod tidy -e
