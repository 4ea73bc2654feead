package translate

import (
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/system"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// TestPauseProfile checks when a pause container gets the profile of its image instead of Docker's
// default profile.
func TestPauseProfile(t *testing.T) {
	runtimeDefault := &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	local := &runtimeapi.SecurityProfile{
		ProfileType:  runtimeapi.SecurityProfile_Localhost,
		LocalhostRef: "/own.json",
	}
	tests := map[string]struct {
		change func(*SandboxOptions, *runtimeapi.LinuxSandboxSecurityContext)
		want   string // of seccomp, "" for the engine's default
	}{
		"default profile": {func(*SandboxOptions, *runtimeapi.LinuxSandboxSecurityContext) {}, "{pause}"},
		"default runtime by name": {func(o *SandboxOptions, _ *runtimeapi.LinuxSandboxSecurityContext) {
			o.RuntimeHandler = "runc"
		}, "{pause}"},
		"no profile": {func(_ *SandboxOptions, sc *runtimeapi.LinuxSandboxSecurityContext) {
			sc.Seccomp = nil
		}, "unconfined"},
		"own profile": {func(o *SandboxOptions, sc *runtimeapi.LinuxSandboxSecurityContext) {
			sc.Seccomp, o.SeccompProfile = local, "{own}"
		}, "{own}"},
		"image of the operator": {func(o *SandboxOptions, _ *runtimeapi.LinuxSandboxSecurityContext) {
			o.Image.Seccomp = ""
		}, ""},
		"profile of the operator": {func(o *SandboxOptions, _ *runtimeapi.LinuxSandboxSecurityContext) {
			o.Host.BuiltinSeccomp = false
		}, ""},
		"runtime handler": {func(o *SandboxOptions, _ *runtimeapi.LinuxSandboxSecurityContext) {
			o.RuntimeHandler = "runsc"
		}, ""},
		"default runtime of another kind": {func(o *SandboxOptions, _ *runtimeapi.LinuxSandboxSecurityContext) {
			o.Host.DefaultRunc = false
		}, ""},
	}

	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			host := hosts["20.10"]
			host.BuiltinSeccomp, host.DefaultRunc, host.DefaultRuntime = true, true, "runc"
			sc := &runtimeapi.LinuxSandboxSecurityContext{Seccomp: runtimeDefault}
			o := SandboxOptions{
				Host:        host,
				Image:       model.PauseImage{Source: "pause:1", Name: "pause:1", Seccomp: "{pause}"},
				NetworkMode: "none",
			}
			test.change(&o, sc)

			c, err := NewSandbox(&runtimeapi.PodSandboxConfig{
				Metadata: &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "default", Uid: "1"},
				Linux:    &runtimeapi.LinuxPodSandboxConfig{SecurityContext: sc},
			}, o)
			if err != nil {
				t.Fatal(err)
			}

			got := ""
			i := slices.IndexFunc(c.Host.SecurityOpt, func(o string) bool { return strings.HasPrefix(o, "seccomp=") })
			if i >= 0 {
				got = strings.TrimPrefix(c.Host.SecurityOpt[i], "seccomp=")
			}
			if got != test.want {
				t.Errorf("seccomp %q, want %q", got, test.want)
			}
		})
	}
}

// TestBuiltinSeccomp reads the engine's default seccomp profile from its answer to /info.
func TestBuiltinSeccomp(t *testing.T) {
	for option, want := range map[string]bool{
		"name=seccomp,profile=default":              true, // Engine 20.10
		"name=seccomp,profile=builtin":              true,
		"name=seccomp,profile=/etc/docker/own.json": false,
		"name=seccomp,profile=unconfined":           false,
		"name=apparmor":                             false,
	} {
		t.Run(option, func(t *testing.T) {
			if h := ReadHost(system.Info{SecurityOptions: []string{option}}, "1.41", 0); h.BuiltinSeccomp != want {
				t.Errorf("built-in profile: %t, want %t", h.BuiltinSeccomp, want)
			}
		})
	}
}

// TestDefaultRunc reads from the engine's answer to /info whether runc is the default runtime.
func TestDefaultRunc(t *testing.T) {
	for program, want := range map[string]bool{
		"":                         false,
		"runc":                     true,
		"/usr/local/bin/runc-1.2":  true,
		"nvidia-container-runtime": true,
		"io.containerd.runc.v2":    true,
		"/usr/bin/crun":            false,
		"io.containerd.kata.v2":    false,
	} {
		t.Run(program, func(t *testing.T) {
			in := system.Info{DefaultRuntime: "x"}
			in.Runtimes = map[string]system.RuntimeWithStatus{"x": {Runtime: system.Runtime{Path: program}}}
			if h := ReadHost(in, "1.41", 0); h.DefaultRunc != want {
				t.Errorf("runc: %t, want %t", h.DefaultRunc, want)
			}
		})
	}

	if h := ReadHost(system.Info{DefaultRuntime: "runc"}, "1.41", 0); !h.DefaultRunc {
		t.Error("runc without a path is not recognized")
	}
}
