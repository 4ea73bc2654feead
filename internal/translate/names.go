package translate

import (
	"fmt"
	"strconv"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

const (
	namePrefix    = "k8s"
	nameSeparator = "_"
)

// SandboxName returns the name of a pause container: k8s_POD_<pod>_<namespace>_<uid>_<attempt>. The
// parts must have passed validate.Request.
func SandboxName(m *runtimeapi.PodSandboxMetadata) string {
	return joinName(model.PauseName, m, m.GetAttempt())
}

// ContainerName returns the name of a container: k8s_<container>_<pod>_<namespace>_<uid>_<attempt>,
// with the attempt of the container. The parts must have passed validate.Request.
func ContainerName(c *runtimeapi.ContainerMetadata, s *runtimeapi.PodSandboxMetadata) string {
	return joinName(c.GetName(), s, c.GetAttempt())
}

func joinName(name string, s *runtimeapi.PodSandboxMetadata, attempt uint32) string {
	return strings.Join([]string{
		namePrefix, name, s.GetName(), s.GetNamespace(), s.GetUid(), strconv.FormatUint(uint64(attempt), 10),
	}, nameSeparator)
}

// name is a parsed container name.
type name struct {
	container, pod, namespace, uid string
	attempt                        uint32
}

// parseName parses a container's name. Old shims appended a seventh part if a name was in use; it
// is ignored.
func parseName(s string) (name, error) {
	parts := strings.Split(strings.TrimPrefix(s, "/"), nameSeparator)
	if (len(parts) != 6 && len(parts) != 7) || parts[0] != namePrefix {
		return name{}, fmt.Errorf("container name %q is not of the form "+
			"k8s_<container>_<pod>_<namespace>_<uid>_<attempt>", s)
	}

	attempt, err := strconv.ParseUint(parts[5], 10, 32)
	if err != nil {
		return name{}, fmt.Errorf("container name %q: attempt: %w", s, err)
	}

	return name{parts[1], parts[2], parts[3], parts[4], uint32(attempt)}, nil
}
