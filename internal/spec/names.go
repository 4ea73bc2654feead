package spec

import (
	"fmt"
	"strconv"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	namePrefix    = "k8s"
	nameSeparator = "_"
	pauseName     = "POD" // stands where a container's name stands in other names
)

// SandboxName is the name of a sandbox's container: k8s_POD_<pod>_<namespace>_<uid>_<attempt>. The
// parts must have passed Validate.
func SandboxName(m *runtimeapi.PodSandboxMetadata) string {
	return joinName(pauseName, m, m.GetAttempt())
}

// ContainerName is the name of a container: k8s_<container>_<pod>_<namespace>_<uid>_<attempt>, the
// attempt being the container's. The parts must have passed Validate.
func ContainerName(c *runtimeapi.ContainerMetadata, s *runtimeapi.PodSandboxMetadata) string {
	return joinName(c.GetName(), s, c.GetAttempt())
}

func joinName(name string, s *runtimeapi.PodSandboxMetadata, attempt uint32) string {
	return strings.Join([]string{
		namePrefix, name, s.GetName(), s.GetNamespace(), s.GetUid(), strconv.FormatUint(uint64(attempt), 10),
	}, nameSeparator)
}

// name is a container's name taken apart.
type name struct {
	container, pod, namespace, uid string
	attempt                        uint32
}

// parseName takes a container's name apart. Old shims appended a seventh part when a name was
// taken; it is ignored.
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
