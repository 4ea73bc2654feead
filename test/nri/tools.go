//go:build tools

// Package nri requires a plugin of the NRI project for tests with the kubelet. It has a module of
// its own because only this old version of NRI's module contains a plugin.
package nri

import _ "github.com/containerd/nri/plugins/ulimit-adjuster"
