package model

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// The checked types hold names from outside. Such names end up in paths, in kernel files or in
// responses. Only the Parse functions create values, so code with such a value needs no further
// check. The zero value means "none". Convert plain strings only in tests.

// ContainerID is the engine's ID of a container: 64 lowercase hexadecimal digits. It is safe as a
// file name.
type ContainerID string

// ParseContainerID checks a container's ID. The error is InvalidArgument.
func ParseContainerID(s string) (ContainerID, error) {
	if !isDigest(s) {
		return "", fmt.Errorf("container ID %s is not 64 hexadecimal digits: %w", quote(s), errdefs.ErrInvalidArgument)
	}
	return ContainerID(s), nil
}

// imageAlgorithm is the only digest algorithm that Docker uses for image IDs.
const imageAlgorithm = "sha256:"

// ImageID is the engine's ID of an image: "sha256:" and 64 lowercase hexadecimal digits.
type ImageID string

// ParseImageID checks an image's ID. The error is InvalidArgument.
func ParseImageID(s string) (ImageID, error) {
	hex, ok := strings.CutPrefix(s, imageAlgorithm)
	if !ok || !isDigest(hex) {
		return "", fmt.Errorf("image ID %s is not sha256: and 64 hexadecimal digits: %w", quote(s),
			errdefs.ErrInvalidArgument)
	}
	return ImageID(s), nil
}

// Hex returns the ID without its algorithm. It is safe as a file name.
func (i ImageID) Hex() string { return strings.TrimPrefix(string(i), imageAlgorithm) }

// PageSize is a size of huge pages as in the names of the kernel's hugetlb files, for instance
// "2MB" (Documentation/admin-guide/cgroup-v1/hugetlb.rst). It is safe within a file name.
type PageSize string

// maxPageSize is the maximum length of a page size in bytes. The largest pages today are "16GB".
const maxPageSize = 8

// ParsePageSize checks a page size: digits and KB, MB or GB. The error is InvalidArgument.
func ParsePageSize(s string) (PageSize, error) {
	number := strings.TrimRight(s, "KMGB")
	unit := s[len(number):]
	valid := len(s) <= maxPageSize && isDecimal(number) && number[0] != '0' &&
		(unit == "KB" || unit == "MB" || unit == "GB")
	if !valid {
		return "", fmt.Errorf("page size %s is not of the form 2MB: %w", quote(s), errdefs.ErrInvalidArgument)
	}

	return PageSize(s), nil
}

// UnifiedKey is the name of a controller's file in a cgroup v2 control group, for instance
// "memory.high" (OCI runtime specification, Linux container configuration, unified). It is safe as
// a file name. Files of the control group itself, such as "cgroup.procs", are not allowed: they
// would move or kill processes.
type UnifiedKey string

// maxUnifiedKey is the maximum length of a key in bytes. The kernel's longest file name has about
// 30 bytes, and MAX_CFTYPE_NAME is 64.
const maxUnifiedKey = 64

// ParseUnifiedKey checks the name of a controller's file. The error is InvalidArgument.
func ParseUnifiedKey(s string) (UnifiedKey, error) {
	controller, file, ok := strings.Cut(s, ".")
	if !ok || len(s) > maxUnifiedKey || !isWord(controller) || !isFilePart(file) {
		return "", fmt.Errorf("unified key %s is not of the form memory.high: %w", quote(s), errdefs.ErrInvalidArgument)
	}

	if controller == "cgroup" {
		return "", fmt.Errorf("unified key %s belongs to the control group itself, not to a controller: %w", s,
			errdefs.ErrInvalidArgument)
	}

	return UnifiedKey(s), nil
}

func isDigest(s string) bool {
	if len(s) != 64 {
		return false
	}

	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}

	return true
}

func isDecimal(s string) bool {
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return false
		}
	}
	return s != ""
}

// isWord accepts the names of controllers: cpu, cpuset, hugetlb, io, memory, misc, pids, rdma.
func isWord(s string) bool {
	for _, c := range []byte(s) {
		if c < 'a' || c > 'z' {
			return false
		}
	}
	return s != ""
}

// isFilePart accepts the rest of a file name after the controller's name: "high", "2MB.max",
// "swap.max", "weight_nice".
func isFilePart(s string) bool {
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_', c == '.', c == '-':
		default:
			return false
		}
	}

	return s != "" && !strings.Contains(s, "..") && s[0] != '.'
}

// quote quotes a rejected value for an error message and truncates it.
func quote(s string) string {
	const shown = 80
	if len(s) > shown {
		return fmt.Sprintf("%q…", s[:shown])
	}
	return fmt.Sprintf("%q", s)
}
