package engine

import (
	"fmt"

	"github.com/distribution/reference"
	"github.com/docker/cli/cli/config"
	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/types/registry"
)

// dockerHub is the key of Docker Hub's credentials in config.json.
const dockerHub = "https://index.docker.io/v1/"

// machineAuth returns the X-Registry-Auth header with this machine's credentials for the registry
// of an image, or "" without credentials. They come from docker login: config.json in dir (default
// $DOCKER_CONFIG or ~/.docker), or a credential helper named there.
func machineAuth(dir, ref string) (string, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return "", err
	}

	file, err := config.Load(dir)
	if err != nil {
		return "", fmt.Errorf("read registry credentials of this node: %w", err)
	}

	host := reference.Domain(named)
	if host == "docker.io" {
		host = dockerHub
	}

	c, err := file.GetAuthConfig(host)
	if err != nil {
		return "", fmt.Errorf("get credentials for %s from %s: %w", host, file.Filename, err)
	}

	if c.Username == "" && c.IdentityToken == "" && c.RegistryToken == "" {
		return "", nil
	}

	return authconfig.Encode(registry.AuthConfig{
		Username:      c.Username,
		Password:      c.Password,
		ServerAddress: c.ServerAddress,
		IdentityToken: c.IdentityToken,
		RegistryToken: c.RegistryToken,
	})
}
