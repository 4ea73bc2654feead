package bundle

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/runtime-tools/generate"
	"github.com/opencontainers/runtime-spec/specs-go"

	"cri-dockerd/internal/shim/annotation"
)

// Exec holds the properties of a container for its execs.
type Exec struct {
	// Output is the daemon's directory for output, "" for none (annotation.OutputVariable).
	Output string

	want annotation.Container
	user specs.User      // of the container
	env  []*api.KeyValue // of NRI plugins: Docker derives the environment from its own record
}

// Exec returns the properties of the container for its execs, after Apply. Unlike the bundle it is
// small.
func (b *Bundle) Exec() Exec {
	x := Exec{
		Output: b.Want.Output,
		want:   annotation.Container{StrictGroups: b.Want.StrictGroups, Ambient: b.Want.Ambient},
		env:    slices.Concat(b.deviceEnv, b.Adjust.GetEnv()),
	}
	if b.Spec.Process != nil {
		x.user = b.Spec.Process.User
	}
	return x
}

// IsZero reports whether Edit changes nothing.
func (x Exec) IsZero() bool { return x.want.IsZero() && len(x.env) == 0 }

// Edit returns the process of an exec with the environment of NRI plugins, and with the groups and
// capabilities of the container, if it runs as the container's own user. Docker derives them from
// the image and the request alone.
func (x Exec) Edit(process []byte) ([]byte, error) {
	p := object{}
	var spec specs.Process
	if err := errors.Join(json.Unmarshal(process, &p), json.Unmarshal(process, &spec)); err != nil {
		return nil, fmt.Errorf("process of an exec: %w", err)
	}

	if len(x.env) > 0 {
		g := &generator{&specs.Spec{Process: &spec}}
		generate.SpecGenerator(g).AdjustEnv(x.env)
		if err := edit(p, "env", func(env *[]string) error { *env = spec.Env; return nil }); err != nil {
			return nil, fmt.Errorf("process of an exec: %w", err)
		}
	}

	if x.want.IsZero() || spec.User.UID != x.user.UID || spec.User.GID != x.user.GID {
		return json.Marshal(p)
	}

	want := x.want
	if spec.Capabilities == nil { // none, as with Docker's --cap-drop ALL
		want.Ambient = nil
	}

	if err := editProcess(p, want); err != nil {
		return nil, fmt.Errorf("process of an exec: %w", err)
	}

	return json.Marshal(p)
}

// TakeOutput removes the variable annotation.OutputVariable from the environment of a process, and
// returns its token. Without a valid token the process is unchanged and the token is "".
func TakeOutput(process []byte) (rest []byte, token string, err error) {
	const prefix = annotation.OutputVariable + "="
	if !bytes.Contains(process, []byte(prefix)) {
		return process, "", nil
	}

	p := object{}
	if err := json.Unmarshal(process, &p); err != nil {
		return nil, "", fmt.Errorf("process of an exec: %w", err)
	}

	err = edit(p, "env", func(env *[]string) error {
		*env = slices.DeleteFunc(*env, func(v string) bool {
			value, ok := strings.CutPrefix(v, prefix)
			if ok = ok && annotation.IsToken(value); ok {
				token = value
			}
			return ok
		})
		return nil
	})
	if err != nil || token == "" {
		return process, "", err
	}

	rest, err = json.Marshal(p)

	return rest, token, err
}
