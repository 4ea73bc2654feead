package engines

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/client"
)

// Version is a version of the engine under test.
type Version string

const (
	V20 Version = "20.10" // Debian 12's package docker.io
	V26 Version = "26.1"  // Debian 13's packages, unpacked by hack/docker26.sh
	V29 Version = "29"    // built from Go modules by hack/docker29.sh
)

// scripts provide the programs of the versions other than the installed one.
var scripts = map[Version]string{V26: "docker26.sh", V29: "docker29.sh"}

// Versions returns the engines to test on: the oldest and the newest. The environment variable
// ENGINE selects one other, or "all".
func Versions() []Version {
	switch v := os.Getenv("ENGINE"); v {
	case "":
		return []Version{V20, V29}
	case "all":
		return []Version{V20, V26, V29}
	case string(V20), string(V26), string(V29):
		return []Version{Version(v)}
	default:
		panic("ENGINE=" + v + ": want 20.10, 26.1, 29 or all")
	}
}

// ShimVersions returns the engines to test the containerd shim on: the oldest one with containerd
// 1.7, and the newest. ENGINE selects others as for Versions, but an engine without annotations
// (API 1.43) never runs the shim.
func ShimVersions() []Version {
	if os.Getenv("ENGINE") == "" {
		return []Version{V26, V29}
	}
	return slices.DeleteFunc(Versions(), func(v Version) bool { return v == V20 })
}

// Programs returns the directory of dockerd, containerd, containerd-shim-runc-v2 and runc of a
// version, or "" for the installed one, also of the version "".
func Programs(tb TB, v Version) string {
	tb.Helper()
	if v == V20 || v == "" {
		return ""
	}

	major, _, _ := strings.Cut(string(v), ".")
	dir := filepath.Join(Cache(), "docker-"+major)
	if _, err := os.Stat(filepath.Join(dir, "dockerd")); err != nil {
		tb.Fatalf("Docker %s is missing; run hack/%s: %v", v, scripts[v], err)
	}

	return dir
}

// Bin returns the directory of the engine's own programs, or "" for the installed ones.
func (e *Engine) Bin() string { return e.bin }

// HasAPI reports whether the engine supports this version of Docker's API ("1.42").
func (e *Engine) HasAPI(tb TB, version string) bool {
	tb.Helper()
	p, err := e.Docker(tb).Ping(context.Background(), client.PingOptions{})
	if err != nil {
		tb.Fatalf("API version of the engine: %v", err)
	}

	return atLeast(tb, p.APIVersion, version)
}

// HasProgram reports whether a program of the engine, such as runc, has at least this version.
func (e *Engine) HasProgram(tb TB, name, version string) bool {
	tb.Helper()
	out, err := e.Command(name, "--version").Output()
	if err != nil {
		tb.Fatalf("version of %s: %v", name, err)
	}

	return atLeast(tb, string(out), version)
}

func atLeast(tb TB, text, version string) bool {
	tb.Helper()
	major, minor, ok := cutVersion(text)
	wantMajor, wantMinor, valid := cutVersion(version)
	if !ok || !valid {
		tb.Fatalf("no version in %q or %q", text, version)
	}

	return major > wantMajor || major == wantMajor && minor >= wantMinor
}

var versionNumber = regexp.MustCompile(`\b(\d+)\.(\d+)`)

// cutVersion returns the first two numbers of the first version in a text.
func cutVersion(text string) (major, minor int, ok bool) {
	m := versionNumber.FindStringSubmatch(text)
	if m == nil {
		return 0, 0, false
	}

	major, majorErr := strconv.Atoi(m[1])
	minor, minorErr := strconv.Atoi(m[2])

	return major, minor, majorErr == nil && minorErr == nil
}
