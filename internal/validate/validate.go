// Package validate contains every rule for CRI requests.
//
// Request checks a request alone. The gRPC interceptor of package rpc calls it before any method,
// so services and package translate rely on it. Sandbox, Container, Update, RuntimeHandler and
// ImageVolumes check a request against the engine and the pod. Services call them before they
// translate.
//
// All functions are pure. Errors are InvalidArgument and begin with the name of the field, unless
// documented otherwise.
package validate

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Request checks a request of either service. It accepts any message, including nil and empty ones.
// Requests of unknown types pass.
func Request(req any) error {
	p := &problems{}
	switch r := req.(type) {
	case *runtimeapi.RunPodSandboxRequest:
		p.sandbox("config", r.GetConfig())
		p.text("runtime_handler", r.GetRuntimeHandler())
	case *runtimeapi.CreateContainerRequest:
		p.id("pod_sandbox_id", r.GetPodSandboxId())
		p.container("config", r.GetConfig())
		p.pod("sandbox_config", r.GetSandboxConfig())

	case *runtimeapi.ExecSyncRequest:
		p.id("container_id", r.GetContainerId())
		p.command(r.GetCmd())
		if r.GetTimeout() < 0 {
			p.add("timeout", "%d must not be negative", r.GetTimeout())
		}

	case *runtimeapi.ExecRequest:
		p.id("container_id", r.GetContainerId())
		p.command(r.GetCmd())
		p.streams(r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTty())

	case *runtimeapi.AttachRequest:
		p.id("container_id", r.GetContainerId())
		p.streams(r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTty())
	case *runtimeapi.PortForwardRequest:
		p.id("pod_sandbox_id", r.GetPodSandboxId())
		for i, port := range r.GetPort() {
			p.port(fmt.Sprintf("port[%d]", i), port)
		}

	case *runtimeapi.UpdateContainerResourcesRequest:
		p.id("container_id", r.GetContainerId())
		p.resources("linux", r.GetLinux())
		p.memoryLimits("linux", r.GetLinux(), false)

	case *runtimeapi.UpdatePodSandboxResourcesRequest:
		p.id("pod_sandbox_id", r.GetPodSandboxId())
		p.resources("overhead", r.GetOverhead())
		p.resources("resources", r.GetResources())

	case *runtimeapi.UpdateRuntimeConfigRequest:
		p.text("runtime_config.network_config.pod_cidr", r.GetRuntimeConfig().GetNetworkConfig().GetPodCidr())
	case *runtimeapi.PullImageRequest:
		p.image("image.image", r.GetImage().GetImage())
	case *runtimeapi.ImageStatusRequest:
		p.image("image.image", r.GetImage().GetImage())
	case *runtimeapi.RemoveImageRequest:
		p.image("image.image", r.GetImage().GetImage())
	default:
		p.simple(req)
	}

	return p.err
}

// simple checks requests with a single ID and few other fields, or with a filter.
func (p *problems) simple(req any) {
	if r, ok := req.(interface{ GetPodSandboxId() string }); ok {
		p.id("pod_sandbox_id", r.GetPodSandboxId())
	}
	if r, ok := req.(interface{ GetContainerId() string }); ok {
		p.id("container_id", r.GetContainerId())
	}
	if r, ok := req.(interface{ GetLocation() string }); ok {
		p.mountPath("location", r.GetLocation())
	}
	if r, ok := req.(interface{ GetTimeout() int64 }); ok && r.GetTimeout() < 0 {
		p.add("timeout", "%d must not be negative", r.GetTimeout())
	}
}

func (p *problems) command(cmd []string) {
	if len(cmd) == 0 {
		p.add("cmd", "must not be empty")
		return
	}
	p.required("cmd[0]", cmd[0])
	p.texts("cmd", cmd)
}

func (p *problems) streams(stdin, stdout, stderr, tty bool) {
	if !stdin && !stdout && !stderr {
		p.add("stdin, stdout, stderr", "one of them must be set")
	}
	if tty && stderr {
		p.add("stderr", "a terminal has no separate stderr")
	}
}

const (
	maxName     = 253     // characters of a pod's name in Kubernetes
	maxText     = 1 << 20 // bytes of any other text for Docker
	maxImage    = 1024    // characters of an image's name with host, tag and digest
	maxHostname = 64      // bytes, sethostname(2)
)

// namePattern is the grammar of the parts of a container's name. Docker allows no other characters,
// and "_" separates the parts.
var namePattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9.-]*$`)

// imagePattern allows the characters of image names (distribution's reference grammar) and IDs.
var imagePattern = regexp.MustCompile(`^[a-zA-Z0-9\[][a-zA-Z0-9._:/@+\[\]-]*$`)

// problems records the first error in a request.
type problems struct{ err error }

// wrap adds the error of a Parse function of package model.
func (p *problems) wrap(field string, err error) {
	if p.err == nil {
		p.err = fmt.Errorf("%s: %w", field, err)
	}
}

func (p *problems) add(field, format string, args ...any) {
	if p.err == nil {
		p.err = fmt.Errorf("%s: %s: %w", field, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
}

// required requires a non-empty text.
func (p *problems) required(field, s string) {
	if s == "" {
		p.add(field, "must not be empty")
	}
	p.text(field, s)
}

// text requires valid UTF-8 without NUL and limits its length.
func (p *problems) text(field, s string) {
	switch {
	case len(s) > maxText:
		p.add(field, "has %d bytes, the maximum is %d", len(s), maxText)
	case !utf8.ValidString(s):
		p.add(field, "is not valid UTF-8")
	case strings.ContainsRune(s, 0):
		p.add(field, "contains a NUL character")
	}
}

// name requires a part of a container's name.
func (p *problems) name(field, s string) {
	switch {
	case s == "":
		p.add(field, "must not be empty")
	case len(s) > maxName:
		p.add(field, "has %d characters, the maximum is %d", len(s), maxName)
	case !namePattern.MatchString(s):
		p.add(field, "%q must consist of letters, digits, '.' and '-', and begin with a letter or digit", s)
	}
}

// id requires an ID without special characters of URLs, since IDs are part of the engine's URLs.
func (p *problems) id(field, s string) {
	p.required(field, s)
	if len(s) > maxName || strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || strings.ContainsRune("/?#%\\", r) || r == 0x7f
	}) {
		p.add(field, "is not an ID")
	}
}

// image requires an image's ID, or its name with tag or digest.
func (p *problems) image(field, s string) {
	switch {
	case s == "":
		p.add(field, "must not be empty")
	case len(s) > maxImage:
		p.add(field, "has %d characters, the maximum is %d", len(s), maxImage)
	case !imagePattern.MatchString(s) || hasDotDot(s):
		p.add(field, "%q is not an image name or ID", s)
	}
}

func (p *problems) texts(field string, list []string) {
	for i, s := range list {
		p.text(fmt.Sprintf("%s[%d]", field, i), s)
	}
}

func (p *problems) textMap(field string, m map[string]string) {
	for k, v := range m {
		if k == "" {
			p.add(field, "has an empty key")
		}
		p.text(field+" key", k)
		p.text(field+"["+strconv.Quote(k)+"]", v)
	}
}

// absolutePath requires an absolute path without "..".
func (p *problems) absolutePath(field, s string) {
	p.required(field, s)
	if s != "" && (!path.IsAbs(s) || hasDotDot(s)) {
		p.add(field, "%q must be an absolute path without '..'", s)
	}
}

// hasDotDot reports whether a path has an element "..".
func hasDotDot(s string) bool { return slices.Contains(strings.Split(s, "/"), "..") }

func (p *problems) port(field string, v int32) {
	if v < 1 || v > 65535 {
		p.add(field, "%d is not a port (1 to 65535)", v)
	}
}

// enum requires a value of a protobuf enum.
func enum[T ~int32](p *problems, field string, names map[int32]string, v T) {
	if _, ok := names[int32(v)]; !ok {
		p.add(field, "%d is not a known value", int32(v))
	}
}
